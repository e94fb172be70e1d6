"""Plans: the training step compiled without TPU hardware, and what the run will cost."""
