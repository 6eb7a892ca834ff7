"""What several test files share: tiny models, hostile inputs, real processes. Programs here are started by path."""
