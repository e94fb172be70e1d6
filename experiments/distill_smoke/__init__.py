"""On-policy distillation on `tiny`: see README.md."""
