"""Checks of `python -m gemma4_tpu.serve serving=local`: keys without effect, and the extra. Imports no JAX."""

from __future__ import annotations

from importlib.util import find_spec

from gemma4_tpu.config.serving import ServingConfig

VLLM_ONLY = (
    "engine", "executable", "image", "tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization",
    "kv_cache_dtype", "flags", "drafter", "extra_args", "env", "compile_cache", "shm_size_gib",
)  # fmt: skip
"""Keys for vLLM and its container."""
NEEDED = ("fastapi", "prometheus_client", "torch", "uvicorn")
"""Modules that the extra `local-serving` installs."""


def local_problems(serving: ServingConfig) -> list[str]:
    """Problems of a server in this process."""
    usual = ServingConfig()
    messages = [
        f"serving.{key}={value}: for vLLM, which serving=local does not use; leave it out"
        for key in VLLM_ONLY
        if (value := getattr(serving, key)) != getattr(usual, key)
    ]
    if serving.weight_dtype == "fp8":
        messages.append("serving.weight_dtype=fp8: serving=local computes in float32 or bfloat16")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        messages.append(f"serving=local needs {', '.join(missing)}: pip install 'gemma4-tpu[local-serving]'")
    return messages
