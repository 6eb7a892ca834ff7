"""Scoring, from sequences to hidden states: every shared prefix runs once."""
