"""Load tests of a language-model server: requests, arrivals, cells, and metrics as `vllm bench serve` defines them."""
