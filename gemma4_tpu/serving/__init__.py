"""Serving: launches vLLM in its container, follows it, verifies that it serves the trained model, stops it. Imports no
JAX.
"""
