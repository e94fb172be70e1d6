"""Evaluation: generation, judging and pass@k."""
