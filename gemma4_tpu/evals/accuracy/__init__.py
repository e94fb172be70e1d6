"""Your own rows as a benchmark: questions, choices, and comparison of answers."""
