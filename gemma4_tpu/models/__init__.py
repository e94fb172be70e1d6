"""The model: forward pass, adapters, layout, sharding rules, loading, the one map of names."""
