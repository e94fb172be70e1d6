"""Plans: compiles the training step without TPU hardware, and estimates what the run will take and cost."""
