"""One page about one or more runs: plan, training, merge, evaluation, serving and cost. Imports no JAX."""
