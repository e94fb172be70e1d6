"""Plans: the training step compiled for a slice that is not there, and what the run will cost."""
