"""Builds vLLM's command, for its container or for this machine. Secrets are passed by name, never by value."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.serving.adapter_checks import lora_rank
from gemma4_tpu.serving.checks import ServeChecked, name_of
from gemma4_tpu.serving.drafter_checks import SPECULATION, speculation
from gemma4_tpu.serving.flag_checks import HANDED_ON, NO_REMOTE_CODE
from gemma4_tpu.serving.model_checks import platform_of

MODEL_MOUNT, ADAPTER_MOUNT, DRAFTER_MOUNT, CACHE_MOUNT = "/model", "/adapters", "/drafter", "/cache"
LABEL = "gemma4-tpu.serve"
QWIX_FP8 = {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"}
NO_EXPERTS = r"^(?!.*(moe|expert)).*$"
"""Excludes experts from Qwix's rule; `REQUANTIZE` converts them to fp8 first, which Qwix would refuse (tpu-inference
#3500, 2026-09-01).
"""
REQUANTIZE = {"MOE_REQUANTIZE_WEIGHT_DTYPE": "float8_e4m3fn"}


def container_name(serving: ServingConfig) -> str:
    """One name per port, so that a second server on it is noticed."""
    return f"gemma4-serve-{serving.port}"


def model_name(serving: ServingConfig, checked: ServeChecked) -> str:
    """The model name for clients."""
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
    words += ["--privileged"] if platform_of(serving) == "tpu" else ["--gpus", "all"]
    mounts = {str(checked.model): MODEL_MOUNT, **dict(zip(_folders(checked), _adapter_mounts(checked), strict=True))}
    if serving.drafter:
        mounts[str(Path(serving.drafter).absolute())] = DRAFTER_MOUNT
    for source, target in mounts.items():
        words += ["--mount", f"type=bind,source={source},target={target},readonly"]
    if cache := cache_folder(serving):
        words += ["--mount", f"type=bind,source={cache},target={CACHE_MOUNT}"]
    for name, value in environment(serving, checked, CACHE_MOUNT if cache else None).items():
        words += ["--env", f"{name}={value}"]
    for name in HANDED_ON:
        words += ["--env", name] if os.environ.get(name) else []
    drafter = DRAFTER_MOUNT if serving.drafter else None
    served = serve_words(serving, checked, MODEL_MOUNT, _adapter_mounts(checked), drafter)
    return [*words, "--entrypoint", "vllm", serving.image, *served]


def process_words(serving: ServingConfig, checked: ServeChecked) -> list[str]:
    """The command on this machine, without its environment."""
    drafter = str(Path(serving.drafter).absolute()) if serving.drafter else None
    return [serving.executable, *serve_words(serving, checked, str(checked.model), _folders(checked), drafter)]


def _folders(checked: ServeChecked) -> list[str]:
    return [str(adapter.folder) for adapter in checked.adapters]


def _adapter_mounts(checked: ServeChecked) -> list[str]:
    """Mounts of the adapters' folders in the container."""
    return [f"{ADAPTER_MOUNT}/{number}" for number in range(len(checked.adapters))]


def process_environment(serving: ServingConfig, checked: ServeChecked | None) -> dict[str, str]:
    """Additions to this process's environment for vLLM's process; `checked` is None for its client."""
    cache = cache_folder(serving)
    return environment(serving, checked, str(cache) if cache else None)


def inherited() -> dict[str, str]:
    """This process's environment, without variables that would shadow vLLM's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}


def environment(serving: ServingConfig, checked: ServeChecked | None, cache: str | None) -> dict[str, str]:
    """Environment variables for vLLM; `checked` is None for its client, `cache` is the folder for compiled programs as
    vLLM sees it.
    """
    own: dict[str, Any] = {"VLLM_ENGINE_READY_TIMEOUT_S": int(serving.ready_timeout_seconds) or 1}
    if cache:
        own["VLLM_XLA_CACHE_PATH" if platform_of(serving) == "tpu" else "VLLM_CACHE_ROOT"] = cache
    if checked and checked.architecture.num_experts and (serving.weight_dtype, platform_of(serving)) == ("fp8", "tpu"):
        own |= REQUANTIZE
    return {name: _plain(value) for name, value in (own | serving.env).items()}


def serve_words(
    serving: ServingConfig, checked: ServeChecked, model: str, adapters: Sequence[str] = (), drafter: str | None = None
) -> list[str]:
    """What follows `vllm`: `serve /model …`; `model`, `adapters` and `drafter` are folders as vLLM sees them."""
    own: dict[str, Any] = {
        "host": serving.host, "port": serving.port, "served-model-name": model_name(serving, checked),
        "tensor-parallel-size": serving.tensor_parallel_size,
        "data-parallel-size": serving.data_parallel_size if serving.data_parallel_size > 1 else None,
        "max-model-len": serving.max_model_len, "max-num-seqs": serving.max_num_seqs,
        "max-num-batched-tokens": serving.max_num_batched_tokens,
        "gpu-memory-utilization": serving.gpu_memory_utilization,
        "kv-cache-dtype": None if serving.kv_cache_dtype == "auto" else serving.kv_cache_dtype,
    }  # fmt: skip
    own |= _weights(serving, checked)
    lora = _lora_words(checked, adapters) if adapters else []
    flags = serving.flags | ({SPECULATION: speculation(serving, drafter)} if drafter else {})
    # The last word counts: nothing before it can make vLLM run a checkpoint's code.
    return ["serve", model, *_flag_words(own), *lora, *_flag_words(flags), *serving.extra_args, NO_REMOTE_CODE]


def _lora_words(checked: ServeChecked, folders: Sequence[str]) -> list[str]:
    """Flags that keep all adapters loaded, so that requests for any of them share a batch."""
    named = zip(checked.adapters, folders, strict=True)
    modules = [_plain({"name": adapter.name, "path": folder}) for adapter, folder in named]
    flags = {"enable-lora": True, "max-lora-rank": lora_rank(checked.adapters), "max-loras": len(modules)}
    return [*_flag_words(flags), "--lora-modules", *modules]


def _weights(serving: ServingConfig, checked: ServeChecked) -> dict[str, Any]:
    """The flags for `serving.weight_dtype`; checkpoints are already in bfloat16."""
    match serving.weight_dtype, platform_of(serving):
        case "fp8", "tpu":
            modules = NO_EXPERTS if checked.architecture.num_experts else ".*"
            rules = [{"module_path": modules, **QWIX_FP8}]
            return {"additional-config": {"quantization": {"qwix": {"rules": rules}}}}
        case "fp8", _:
            return {"quantization": "fp8"}
        case dtype, "cpu":
            return {"dtype": dtype}
    return {}


def shown(words: Sequence[str]) -> str:
    """The command for a shell, with one flag and its value per line."""
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
            case _ if _plain(value).startswith("-"):  # alone, vLLM's parser would take it for a flag
                yield f"--{name}={_plain(value)}"
            case _:
                yield from (f"--{name}", _plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"))
    return str(value).lower() if isinstance(value, bool) else str(value)
