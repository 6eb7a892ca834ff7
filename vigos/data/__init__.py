"""From a stranger's file to examples: readers, published benchmarks, images, bounded decoding."""
