"""The method: who reads what, and who supervises which token. Pure: no model, no transformers."""
