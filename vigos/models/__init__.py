"""Inside a transformers model: its parts, its image features, its shards."""
