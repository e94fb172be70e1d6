"""Exports a trained run for other tools, merged or as a PEFT adapter, and verifies that it is the trained model."""
