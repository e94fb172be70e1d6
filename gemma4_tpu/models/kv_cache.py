"""Bytes that a served model keeps in device memory: weights and KV cache. Arithmetic only; imports no JAX.

A layer keeps one key and one value of `head_dim` numbers for each KV head and each token that later tokens can still
see, so

    bytes = 2 · KV heads · head_dim · tokens seen · bytes per number, summed over the layers,

with Gemma 4's exceptions as `models/gemma4.py` and transformers' `Gemma4TextAttention` compute them: sliding layers see
at most `sliding_window` tokens; KV-shared layers (E2B, E4B) keep nothing of their own; where `k_eq_v` drops a global
layer's value *projection*, its key is normalised and rotated while its value is only normalised, so both are kept:
`k_eq_v` saves weights, not cache. Engines that split heads over `tp` chips replicate them if there are fewer heads than
chips.
"""

from __future__ import annotations

import math

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.models.weights import rows, sizes

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e5m2": 1, "fp8_e4m3": 1, "int8": 1}
"""Bytes of one number, by the names that vLLM and checkpoints use."""


def kv_heads_held(heads: int, tp: int) -> int:
    """KV heads that `tp` chips hold together: each chip has at least one, so heads are replicated if there are
    fewer.
    """
    return math.ceil(heads / tp) * tp


def layer_kv_bytes_per_token(arch: Architecture, layer: int, dtype_bytes: int, tp: int = 1) -> int:
    """Bytes that one token adds to the cache of `layer`, over all `tp` chips; 0 if its KV is shared."""
    if arch.is_kv_shared(layer):
        return 0
    return 2 * kv_heads_held(arch.layer_kv_heads(layer), tp) * arch.layer_head_dim(layer) * dtype_bytes


def kv_cache_bytes(arch: Architecture, tokens: int, dtype_bytes: int = 2, *, tp: int = 1, windowed: bool = True) -> int:
    """KV cache of one sequence of `tokens` tokens, over all `tp` chips, in bytes.

    Args:
      arch: the model.
      tokens: length of the sequence, prompt and answer together.
      dtype_bytes: bytes of one number (`DTYPE_BYTES`).
      tp: chips that the heads are split over; heads are replicated if there are fewer than chips.
      windowed: sliding layers discard what is outside their window; False: the engine keeps all tokens in all layers
        (vLLM without its hybrid KV-cache manager).
    """
    total = 0
    for layer in range(arch.num_layers):
        sliding = windowed and not arch.is_global(layer)
        seen = min(tokens, arch.sliding_window) if sliding else tokens
        total += seen * layer_kv_bytes_per_token(arch, layer, dtype_bytes, tp)
    return total


def parameter_count(arch: Architecture) -> int:
    """Parameters of the text model, all experts included; the tied output table counts once."""
    places = (None, *range(arch.num_layers))
    return sum(math.prod(row.shape(sizes(arch, layer or 0))) for layer in places for row in rows(arch, layer))


def weight_bytes(arch: Architecture, dtype_bytes: int = 2) -> int:
    """Bytes of the text model's weights in a dtype, all experts included (without vision and audio towers)."""
    return parameter_count(arch) * dtype_bytes
