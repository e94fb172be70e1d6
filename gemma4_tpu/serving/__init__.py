"""Serving: vLLM in its container, launched, followed, asked whether it is the trained model, stopped. No JAX here."""
