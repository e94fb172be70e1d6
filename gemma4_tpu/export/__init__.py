"""Exports a trained run for other tools, merged or as a PEFT adapter, verified to be the model that was trained."""
