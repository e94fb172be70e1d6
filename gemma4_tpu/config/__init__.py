"""The configuration: types, composition, checks. No JAX."""
