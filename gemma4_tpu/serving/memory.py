"""Estimates whether weights and KV cache fit into the chips, with the arithmetic, before a container is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GIB, LOCAL, SLICES
from gemma4_tpu.models.kv_cache import DTYPE_BYTES, kv_cache_bytes, kv_heads_held, parameter_count
from gemma4_tpu.serving.adapter_checks import ServedAdapter, lora_rank
from gemma4_tpu.serving.model_checks import platform_of


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per chip; weights and cache of the text model only. Activations, programs and vision towers come on top."""

    weight_bytes: float
    kv_bytes: float
    """Cache of one sequence of `max_model_len` tokens."""
    room_bytes: float
    """Memory of a chip times `gpu_memory_utilization`."""
    sequences: int
    """Sequences of full length that fit into the cache, over all copies; 0: it does not fit."""
    longest_tokens: int
    """Longest single sequence that would fit."""
    formula: tuple[str, ...]
    """Derivation of these numbers, one per line."""

    @property
    def fits(self) -> bool:
        return self.sequences > 0


def estimate(
    arch: Architecture,
    serving: ServingConfig,
    adapters: Sequence[ServedAdapter] = (),
    quantised_bytes: int | None = None,
) -> MemoryEstimate:
    """The estimate for a model, and adapters on it, on `serving.slice`.

    `quantised_bytes`: size of its files, if they are quantised.
    """
    tp = serving.tensor_parallel_size
    windowed = _keeps_windows(serving)
    weight_dtype_bytes = DTYPE_BYTES[serving.weight_dtype]
    usual = serving.weight_dtype if serving.slice == LOCAL else "bfloat16"
    kv_dtype_bytes = DTYPE_BYTES[usual if serving.kv_cache_dtype == "auto" else serving.kv_cache_dtype]

    def cache(tokens: int) -> float:
        return kv_cache_bytes(arch, tokens, kv_dtype_bytes, tp=tp, windowed=windowed) / tp

    slots, slots_told = _adapter_slots(arch, serving, adapters)
    told = f"{parameter_count(arch) / 1e9:.2f} G parameters × {weight_dtype_bytes} bytes"
    if quantised_bytes is not None:
        told = f"{quantised_bytes / GIB:.2f} GiB of quantised files"
    weights = (quantised_bytes or parameter_count(arch) * weight_dtype_bytes) / tp + slots
    memory, whose = _memory(serving)
    room = memory * serving.gpu_memory_utilization
    one = cache(serving.max_model_len)
    sequences = max(0, int((room - weights) // one)) * serving.data_parallel_size
    low, high = 0, 1 << 24
    while high - low > 1:  # the longest sequence whose cache fits into the memory that the weights leave
        middle = (low + high) // 2
        low, high = (middle, high) if cache(middle) <= room - weights else (low, middle)
    formula = (
        f"weights {weights / GIB:.2f} GiB = {told} / {tp} chips{slots_told}",
        f"KV cache of one sequence {one / GIB:.2f} GiB = {_cache_formula(arch, serving, kv_dtype_bytes, windowed)}",
        f"room {room / GIB:.2f} GiB = {memory / GIB:.2f} GiB of {whose} × {serving.gpu_memory_utilization:g}",
    )
    return MemoryEstimate(weights, one, room, sequences, low, formula)


def _adapter_slots(arch: Architecture, serving: ServingConfig, adapters: Sequence[ServedAdapter]) -> tuple[float, str]:
    """Bytes that vLLM reserves on each chip for adapters: for each of them, A and B of every product at the largest
    rank; and the same in words.
    """
    if not adapters:
        return 0.0, ""
    sides = 0  # summed input and output sizes of all products
    for layer in range(arch.num_layers):
        width, hidden = arch.layer_head_dim(layer), arch.layer_hidden_dim(layer)
        outputs = [arch.num_heads * width, *[arch.layer_kv_heads(layer) * width] * 2, hidden, hidden]
        sides += sum(outputs) + len(outputs) * arch.embed_dim + arch.num_heads * width + hidden + 2 * arch.embed_dim
    rank, bytes_each = lora_rank(adapters), DTYPE_BYTES["float32" if serving.weight_dtype == "float32" else "bfloat16"]
    found = len(adapters) * rank * sides * bytes_each / serving.tensor_parallel_size
    return found, f" + {found / GIB:.2f} GiB for {len(adapters)} adapters of rank {rank}"


def _memory(serving: ServingConfig) -> tuple[float, str]:
    """Memory of one device in bytes, and its name."""
    if serving.slice == LOCAL:
        return psutil.virtual_memory().total, "this machine"
    chip = SLICES[serving.slice].chip
    return chip.device.hbm_bytes, f"a {chip.device.name} {'chip' if chip.devices == 1 else 'device'}"


def check_memory(
    found: MemoryEstimate,
    arch: Architecture,
    serving: ServingConfig,
    adapters: Sequence[ServedAdapter] = (),
    quantised_bytes: int | None = None,
) -> None:
    """Raises `UserError` if the weights and one sequence of full length do not fit; says which changes would help."""
    if found.fits:
        return
    total = (found.weight_bytes + found.kv_bytes) / GIB
    lines = "".join(f"\n  {line}" for line in found.formula)
    ways = [
        " ".join(f"serving.{key}={value}" for key, value in change.items())
        for change in _changes(found, arch, serving)
        if not (quantised_bytes and "weight_dtype" in change)
        and estimate(arch, replace(serving, **change), adapters, quantised_bytes).fits
    ]
    advice = f"what would fit: {'; '.join(ways)}" if ways else "no single change helps; use a larger slice"
    raise UserError(
        f"serving.max_model_len={serving.max_model_len}: does not fit into {serving.slice}: per chip {total:.2f} GiB"
        f" are needed, {found.room_bytes / GIB:.2f} GiB are available (estimated):{lines}\n{advice}"
    )


def _changes(found: MemoryEstimate, arch: Architecture, serving: ServingConfig) -> Iterator[dict[str, Any]]:
    """Changes worth trying, the mildest first."""
    devices = 1 if serving.slice == LOCAL else SLICES[serving.slice].devices
    yield {"kv_cache_dtype": "fp8"}
    for tp in range(serving.tensor_parallel_size + 1, devices + 1):
        if devices % tp == 0 and arch.num_heads % tp == 0:
            yield {"tensor_parallel_size": tp, "data_parallel_size": devices // tp}
    yield {"weight_dtype": "fp8"}
    yield {"weight_dtype": "fp8", "kv_cache_dtype": "fp8"}
    if found.longest_tokens >= 16:
        yield {"max_model_len": found.longest_tokens // 16 * 16}


def _keeps_windows(serving: ServingConfig) -> bool:
    """Whether sliding layers keep only their window.

    vLLM's cache manager does that on GPUs and CPUs. On TPUs, tpu-inference keeps the whole sequence in every layer of
    Gemma 4, because head widths differ between layers ("re-enable sliding_window once mixed dims … is supported",
    kv_cache_manager.py).
    """
    return platform_of(serving) != "tpu" and not serving.flags.get("disable-hybrid-kv-cache-manager")


def _cache_formula(arch: Architecture, serving: ServingConfig, dtype_bytes: int, windowed: bool) -> str:
    tp, own = serving.tensor_parallel_size, range(arch.num_unshared_layers)
    tokens = serving.max_model_len
    parts = []
    for is_global, heads, width in (
        (False, arch.num_kv_heads, arch.head_dim),
        (True, arch.num_global_kv_heads, arch.global_head_dim),
    ):
        layers = sum(arch.is_global(i) == is_global for i in own)
        seen = tokens if is_global or not windowed else min(tokens, arch.sliding_window)
        kind = "global" if is_global else "sliding"
        parts.append(f"{layers} {kind} layers × {seen:,} tokens × {kv_heads_held(heads, tp)} KV heads × {width}")
    return f"2 × ({' + '.join(parts)}) × {dtype_bytes} byte{'s' * (dtype_bytes > 1)} / {tp} chips"
