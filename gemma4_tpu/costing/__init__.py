"""Physical ceilings of slices, throughputs held against them, and what runs and served tokens cost. No JAX here."""
