"""Checks of vLLM's image, flags and environment. Imports no JAX.

The known flags of `vllm serve` are those that version 0.32 prints with `--help=all` (`assets/vllm_0_32_flags.txt`).
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path

from gemma4_tpu import assets
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.redact import is_secret
from gemma4_tpu.serving.model_checks import platform_of

KNOWN_IMAGES = r"(.*/)?vllm/vllm-(tpu|openai):v0\.32\.\d+(@sha256:[0-9a-f]{64})?"
"""Images whose flags the list covers."""
LORA_FLAGS = "serve adapters with adapters=[<run folder>, …], which checks them first"
HANDED_ON = ("HF_TOKEN", "VLLM_API_KEY")
"""Environment variables passed to vLLM by name, so that no command line or file contains their values."""
OWN_FLAGS = {
    "model": "run", "host": "serving.host", "port": "serving.port", "served-model-name": "serving.served_model_name",
    "tensor-parallel-size": "serving.tensor_parallel_size", "data-parallel-size": "serving.data_parallel_size",
    "max-model-len": "serving.max_model_len", "max-num-seqs": "serving.max_num_seqs",
    "max-num-batched-tokens": "serving.max_num_batched_tokens", "kv-cache-dtype": "serving.kv_cache_dtype",
    "gpu-memory-utilization": "serving.gpu_memory_utilization",
}  # fmt: skip
"""Flags that have their own key."""
_RENAMED = {"disable-log-requests": "no-enable-log-requests (it was renamed; requests are not logged by default)"}
_SECRET = re.compile(r"(^|_)(token|key|secret|password)$", re.IGNORECASE)
_LORA = re.compile(r"-{0,2}(no-)?(enable[-_]lora|lora[-_]\w+|max[-_]loras?\b.*|default[-_]mm[-_]loras)", re.IGNORECASE)
_SECRETS = {"api-key": "VLLM_API_KEY", "hf-token": "HF_TOKEN"}
"""Flag → the variable that vLLM reads instead."""
_REMOTE_CODE, NO_REMOTE_CODE = "trust-remote-code", "--no-trust-remote-code"
_NO_REMOTE_CODE = "would run code from a checkpoint, which Gemma 4 does not need: leave it out"
_FILE = "config"
_NO_FILE = "the flags in a file of vLLM's would be unchecked; give them as serving.flags"
_PARSERS = ("tool-call-parser", "reasoning-parser")
_PARSER = "gemma4"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VERSION = re.compile(r"(^v?|[-_]v)\d+\.\d+\.\d+")
"""The image's own, complete: `v0.32` moves with 0.32.1, and `py3.12.1` or `cuda12.8.1` is of something in it."""
_BUILD = re.compile(r"(?<![0-9a-z])(20\d{6}|20\d\d-\d\d-\d\d|(?=[0-9a-f]*\d)[0-9a-f]{7,40})(?![0-9a-z])")
"""A day or a commit."""
_MOVING = re.compile(r"(?<![a-z])(latest|nightly|stable|main|master|head|edge|dev|canary|rolling)(?![a-z])")
"""Words of tags that are given to each new build: next to them a version pins nothing."""


@cache
def known_flags() -> frozenset[str]:
    """Flags of `vllm serve` 0.32, without leading dashes."""
    return frozenset(Path(assets.ROOT, "vllm_0_32_flags.txt").read_text(encoding="utf-8").split())


def vllm_problems(serving: ServingConfig) -> list[str]:
    """Problems with the image, flags and environment for vLLM."""
    messages = [] if serving.runner == "process" else _image(serving)
    return messages + _flags(serving) + _environment(serving) + _told_secret(serving)


def _image(serving: ServingConfig) -> list[str]:
    image = serving.image
    name, _, digest = image.partition("@")
    tag = name.rsplit("/", 1)[-1].partition(":")[2]
    if not image:
        return ["serving.image is not set; set serving.image=<name>:<version> or <name>@sha256:<digest>"]
    if re.search(r"\s", image) or image.startswith("-"):
        return [f"serving.image={image}: not the name of an image"]
    if "@" in image and not _DIGEST.fullmatch(digest):
        return [f"serving.image={image}: {digest or 'nothing'} is not a digest; it has the form sha256:<64 digits>"]
    if digest or _BUILD.search(tag) or (_VERSION.search(tag) and not _MOVING.search(tag.lower())):
        return []
    told = f"the tag {tag}" if tag else "no tag"
    return [
        f"serving.image={image}: {told} can refer to another image tomorrow; pin a version (vllm/vllm-tpu:v0.32.0) or a"
        " digest (vllm/vllm-tpu@sha256:…)"
    ]


def _flags(serving: ServingConfig) -> list[str]:
    messages = []
    checked = serving.runner == "process" or re.fullmatch(KNOWN_IMAGES, serving.image) is not None
    for name, value in serving.flags.items():
        given, meant = f"serving.flags.{name}", _meant(name)
        if any(map(_LORA.fullmatch, meant)):
            messages.append(f"{given}: {LORA_FLAGS}")
        elif secret := meant & _SECRETS.keys():
            variable = _SECRETS[secret.pop()]
            messages.append(f"{given}: every user can read command lines; set {variable} in the environment instead")
        elif _REMOTE_CODE in meant and value is not False:
            messages.append(f"{given}: {_NO_REMOTE_CODE}")
        elif _FILE in meant:
            messages.append(f"{given}: {_NO_FILE}")
        elif name in OWN_FLAGS:
            messages.append(f"{given}: give {OWN_FLAGS[name]} instead")
        elif name in _PARSERS and value not in (None, _PARSER):
            messages.append(
                f"{given}={value}: Gemma 4's is {_PARSER}, and an unknown name fails only when the server"
                f" starts; serving.extra_args=[--{name},{value}] passes it unchecked"
            )
        elif checked and name not in known_flags():
            messages.append(f"{given}: {_no_such_flag(name)}")
        elif checked and value is False and f"no-{name}" not in known_flags():
            messages.append(f"{given}=false: vllm serve 0.32 has no --no-{name}; null leaves the flag out")
    for word in serving.extra_args:
        flag, meant = word.partition("=")[0], _meant(word) if word.startswith("--") else set()
        if any(map(_LORA.fullmatch, meant)):
            messages.append(f"serving.extra_args: {flag}: {LORA_FLAGS}")
        elif meant & _SECRETS.keys():
            messages.append(f"serving.extra_args: {flag}: secrets come from the environment, by name")
        elif _REMOTE_CODE in meant:
            messages.append(f"serving.extra_args: {word}: {_NO_REMOTE_CODE}")
        elif _FILE in meant:
            messages.append(f"serving.extra_args: {flag}: {_NO_FILE}")
    if serving.weight_dtype == "fp8" and {"additional-config", "quantization"} & serving.flags.keys():
        messages.append("serving.weight_dtype=fp8: set either this, or serving.flags.additional-config or quantization")
    on_tpu = serving.slice in SLICES and platform_of(serving) == "tpu"
    if serving.weight_dtype == "fp8" and on_tpu and serving.env.get("MODEL_IMPL_TYPE") == "vllm":
        messages.append(
            "serving.weight_dtype=fp8: Qwix quantises the JAX models of tpu-inference alone, so with"
            " serving.env.MODEL_IMPL_TYPE=vllm weights would silently stay bfloat16; set serving.weight_dtype=bfloat16"
        )
    return messages


def _meant(word: str) -> set[str]:
    """The flags that vLLM's parser could take a word for: it completes beginnings, takes `_` for `-`, and reads
    `--flag.key` as a part of `--flag`.
    """
    name = re.split(r"[=.]", word.lstrip("-"), maxsplit=1)[0].replace("_", "-")
    return {name} if name in known_flags() or not name else {name, *(f for f in known_flags() if f.startswith(name))}


def _no_such_flag(name: str) -> str:
    if name in _RENAMED:
        return f"not a flag of vllm serve 0.32; did you mean {_RENAMED[name]}?"
    hint = did_you_mean(name, known_flags())
    return f"not a flag of vllm serve 0.32{hint} (serving.extra_args passes words unchecked)"


def _told_secret(serving: ServingConfig) -> list[str]:
    """Whether the value of a secret in this process's environment appears in the configuration."""
    words = json.dumps([serving.flags, serving.extra_args, serving.env, serving.engine], default=str)
    return [
        f"serving: the value of {name} is in flags, extra_args or env; leave it out, it is passed on by name"
        for name in HANDED_ON
        if len(value := os.environ.get(name, "")) >= 8 and value in words
    ]


def _environment(serving: ServingConfig) -> list[str]:
    messages = []
    for name, value in serving.env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            messages.append(f"serving.env.{name}: not the name of an environment variable")
        elif _SECRET.search(name) or (isinstance(value, str) and is_secret(name, value)):
            messages.append(
                f"serving.env.{name}: no secrets in the configuration; HF_TOKEN and VLLM_API_KEY are passed on from the"
                " environment, other names by serving.engine (docker's own configuration)"
            )
        elif isinstance(value, dict | list):
            messages.append(f"serving.env.{name}: must be a string or a number")
    return messages
