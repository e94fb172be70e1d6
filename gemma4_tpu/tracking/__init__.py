"""The run folder and what is written to it: metrics, logs, provenance, plots, trackers, the result. Imports no JAX."""
