"""The trainer, its options and its parts."""
