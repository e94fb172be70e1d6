"""Whether weights and KV cache fit into the chips: an estimate with its arithmetic, before a container is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import GIB, SLICES
from gemma4_tpu.models.kv_cache import DTYPE_BYTES, kv_cache_bytes, kv_heads_held, parameter_count


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per chip; weights and cache of the text model only: activations, programs and vision towers come on top."""

    weight_bytes: float
    kv_bytes: float
    """Cache of one sequence of `max_model_len` tokens."""
    room_bytes: float
    """Memory of a chip times `gpu_memory_utilization`."""
    sequences: int
    """Sequences of full length that the cache has room for, on all copies together; 0: it does not fit."""
    longest_tokens: int
    """Longest single sequence that would fit."""
    formula: tuple[str, ...]
    """How these numbers come about, a line each."""

    @property
    def fits(self) -> bool:
        return self.sequences > 0


def estimate(arch: Architecture, serving: ServingConfig) -> MemoryEstimate:
    """The estimate for a model on `serving.slice`."""
    slice_, tp = SLICES[serving.slice], serving.tensor_parallel_size
    windowed = _keeps_windows(serving)
    weight_dtype_bytes = DTYPE_BYTES[serving.weight_dtype]
    kv_dtype_bytes = 2 if serving.kv_cache_dtype == "auto" else DTYPE_BYTES[serving.kv_cache_dtype]

    def cache(tokens: int) -> float:
        return kv_cache_bytes(arch, tokens, kv_dtype_bytes, tp=tp, windowed=windowed) / tp

    weights = parameter_count(arch) * weight_dtype_bytes / tp
    device, kind = slice_.chip.device, "chip" if slice_.chip.devices == 1 else "device"
    room = device.hbm_bytes * serving.gpu_memory_utilization
    one = cache(serving.max_model_len)
    sequences = max(0, int((room - weights) // one)) * serving.data_parallel_size
    low, high = 0, 1 << 24
    while high - low > 1:  # the longest sequence whose cache fits into what the weights leave
        middle = (low + high) // 2
        low, high = (middle, high) if cache(middle) <= room - weights else (low, middle)
    formula = (
        f"weights {weights / GIB:.2f} GiB = {parameter_count(arch) / 1e9:.2f} G parameters × {weight_dtype_bytes} bytes"
        f" / {tp} chips",
        f"KV cache of one sequence {one / GIB:.2f} GiB = {_cache_formula(arch, serving, kv_dtype_bytes, windowed)}",
        f"room {room / GIB:.2f} GiB = {device.hbm_bytes / GIB:.2f} GiB of a {device.name} {kind}"
        f" × {serving.gpu_memory_utilization:g}",
    )
    return MemoryEstimate(weights, one, room, sequences, low, formula)


def check_memory(found: MemoryEstimate, arch: Architecture, serving: ServingConfig) -> None:
    """Raises `UserError` where the weights and one sequence of full length don't fit; says which changes would."""
    if found.fits:
        return
    slice_ = SLICES[serving.slice]
    total = (found.weight_bytes + found.kv_bytes) / GIB
    lines = "".join(f"\n  {line}" for line in found.formula)
    ways = [
        " ".join(f"serving.{key}={value}" for key, value in change.items())
        for change in _changes(found, arch, serving)
        if estimate(arch, replace(serving, **change)).fits
    ]
    advice = f"what would fit: {'; '.join(ways)}" if ways else "no single change helps; take a larger slice"
    raise UserError(
        f"serving.max_model_len={serving.max_model_len}: does not fit into {slice_.name}: per chip {total:.2f} GiB are"
        f" needed, {found.room_bytes / GIB:.2f} GiB are there (estimated):{lines}\n{advice}"
    )


def _changes(found: MemoryEstimate, arch: Architecture, serving: ServingConfig) -> Iterator[dict[str, Any]]:
    """Changes worth trying, the mildest first."""
    devices = SLICES[serving.slice].devices
    yield {"kv_cache_dtype": "fp8"}
    for tp in range(serving.tensor_parallel_size + 1, devices + 1):
        if devices % tp == 0 and arch.num_heads % tp == 0:
            yield {"tensor_parallel_size": tp, "data_parallel_size": devices // tp}
    yield {"weight_dtype": "fp8"}
    yield {"weight_dtype": "fp8", "kv_cache_dtype": "fp8"}
    if found.longest_tokens >= 16:
        yield {"max_model_len": found.longest_tokens // 16 * 16}


def _keeps_windows(serving: ServingConfig) -> bool:
    """Whether sliding layers keep their window only.

    vLLM's cache manager does that on GPUs. On TPUs tpu-inference gives every layer of Gemma 4 the whole sequence, since
    its layers' heads differ in width ("re-enable sliding_window once mixed dims … is supported", kv_cache_manager.py).
    """
    on_gpu = SLICES[serving.slice].chip.platform == "gpu"
    return on_gpu and not serving.flags.get("disable-hybrid-kv-cache-manager")


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
