"""The model: a table of weights; from it names, layout, sharding and adapters; forward pass, decoding, loading."""
