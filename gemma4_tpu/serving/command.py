"""The container command, word by word. Secrets are named, never written: `--env HF_TOKEN`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.serving.checks import HANDED_ON, ServeChecked, name_of

MODEL_MOUNT, CACHE_MOUNT = "/model", "/cache"
LABEL = "gemma4-tpu.serve"
QWIX_FP8 = {"module_path": ".*", "weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"}


def container_name(serving: ServingConfig) -> str:
    """One name for each port, so that two servers can't be there unnoticed."""
    return f"gemma4-serve-{serving.port}"


def model_name(serving: ServingConfig, checked: ServeChecked) -> str:
    """What clients ask for."""
    return serving.served_model_name or name_of(checked.model)


def cache_folder(serving: ServingConfig) -> Path | None:
    """The local folder for compiled programs."""
    if serving.compile_cache != "auto":
        return Path(serving.compile_cache).absolute() if serving.compile_cache else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gemma4_tpu", "vllm").absolute()


def run_words(serving: ServingConfig, checked: ServeChecked) -> list[str]:
    """What follows the container engine's name: `run --detach …`."""
    words = ["run", "--detach", "--name", container_name(serving), "--label", LABEL]
    words += ["--network", "host", "--shm-size", f"{serving.shm_size_gib}g"]
    on_tpu = SLICES[serving.slice].chip.platform == "tpu"
    words += ["--privileged"] if on_tpu else ["--gpus", "all"]
    words += ["--mount", f"type=bind,source={checked.model},target={MODEL_MOUNT},readonly"]
    environment: dict[str, Any] = {"VLLM_ENGINE_READY_TIMEOUT_S": int(serving.ready_timeout_seconds) or 1}
    if cache := cache_folder(serving):
        words += ["--mount", f"type=bind,source={cache},target={CACHE_MOUNT}"]
        environment |= {"VLLM_XLA_CACHE_PATH": CACHE_MOUNT} if on_tpu else {"VLLM_CACHE_ROOT": CACHE_MOUNT}
    for name, value in (environment | serving.env).items():
        words += ["--env", f"{name}={_plain(value)}"]
    for name in HANDED_ON:
        words += ["--env", name] if os.environ.get(name) else []
    return [*words, "--entrypoint", "vllm", serving.image, *serve_words(serving, model_name(serving, checked))]


def serve_words(serving: ServingConfig, name: str) -> list[str]:
    """What follows `vllm`: `serve /model …`."""
    own: dict[str, Any] = {
        "host": serving.host, "port": serving.port, "served-model-name": name,
        "tensor-parallel-size": serving.tensor_parallel_size,
        "data-parallel-size": serving.data_parallel_size if serving.data_parallel_size > 1 else None,
        "max-model-len": serving.max_model_len, "max-num-seqs": serving.max_num_seqs,
        "max-num-batched-tokens": serving.max_num_batched_tokens,
        "gpu-memory-utilization": serving.gpu_memory_utilization,
        "kv-cache-dtype": None if serving.kv_cache_dtype == "auto" else serving.kv_cache_dtype,
    }  # fmt: skip
    if serving.weight_dtype == "fp8":
        on_tpu = SLICES[serving.slice].chip.platform == "tpu"
        own |= (
            {"additional-config": {"quantization": {"qwix": {"rules": [QWIX_FP8]}}}}
            if on_tpu
            else {"quantization": "fp8"}
        )
    return ["serve", MODEL_MOUNT, *_flag_words(own), *_flag_words(serving.flags), *serving.extra_args]


def shown(words: Sequence[str]) -> str:
    """The command for a shell, a flag with its value on each line."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([word])
        else:
            lines[-1].append(word)
    return " \\\n  ".join(" ".join(map(shlex.quote, line)) for line in lines)


def _flag_words(flags: dict[str, Any]) -> Iterator[str]:
    for name, value in flags.items():
        match value:
            case None:
                continue
            case True:
                yield f"--{name}"
            case False:
                yield f"--no-{name}"
            case _:
                yield from (f"--{name}", _plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"))
    return str(value).lower() if isinstance(value, bool) else str(value)
