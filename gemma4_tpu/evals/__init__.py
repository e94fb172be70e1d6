"""Generation, judging and pass@k."""
