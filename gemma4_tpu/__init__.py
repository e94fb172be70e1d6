"""Fine-tune, merge, evaluate, serve, benchmark and cost Gemma 4 on TPUs."""

__version__ = "0.1.0"
