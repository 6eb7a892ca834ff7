"""Share between test files: tiny models, hostile inputs, real processes. Programs here are started by path."""
