"""The configuration: types, composition, checks. Imports no JAX."""
