"""Data files to examples: readers, published benchmarks, images, bounded decoding."""
