"""Load on a server of language models: requests, arrivals, cells, metrics as `vllm bench serve` defines them."""
