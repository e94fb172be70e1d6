"""Rows of your own as a benchmark: questions, choices, and answers that are compared."""
