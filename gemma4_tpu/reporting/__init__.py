"""One page about one or several runs: planned, trained, merged, evaluated, served, and what it cost. No JAX."""
