"""Rollouts, from a prompt to completion ids: the model's own `generate`, a server, vLLM."""
