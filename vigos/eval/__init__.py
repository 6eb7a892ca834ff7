"""Evaluation: sampling, grading, statistics, probes."""
