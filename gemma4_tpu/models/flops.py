"""Analytic FLOP counts: what the model's mathematics needs, whatever a compiler makes of it. No JAX here.

A multiply-add counts as two. Backward passes: activation gradients cost as much as the forward pass; weight gradients
as much again, but only for weights that are trained. LoRA trains almost none, hence 4 FLOPs per parameter and token
instead of 6.
"""

from __future__ import annotations

import math

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.names import Tensor, adapted_tensors, name_map
from gemma4_tpu.models.weights import PER_LAYER_TABLE


def matmul_parameters(arch: Architecture) -> int:
    """Parameters that each token is multiplied with: active experts only, the output table included."""

    def active(tensor: Tensor) -> int:
        values = math.prod(tensor.shape)
        return values // arch.num_experts * arch.experts_per_token if tensor.weight.each else values

    products = (t for t in name_map(arch).values() if t.weight.inputs and t.name != PER_LAYER_TABLE)
    return sum(map(active, products))


def lora_parameters(arch: Architecture, lora: LoraConfig) -> int:
    """Trained parameters of the adapters: an A `[r, in]`; for each weight on disk a B `[out, r]` and DoRA's lengths."""
    adapted, count = Layout.of(arch, lora).adapted, 0
    for tensor in adapted_tensors(arch, adapted).values():
        how, outputs = adapted[tensor.name], len(tensor.hf_names) * tensor.hf_shape[-2]
        count += how.rank * (tensor.hf_shape[-1] + outputs) + how.dora * outputs
    return count


def attention_flops(arch: Architecture, length: float) -> float:
    """Scores and weighted values of one forward pass, per token of a segment with `length` tokens (causal mean)."""
    flops = 0.0
    for i in range(arch.num_layers):
        seen = (length + 1) / 2
        window = arch.sliding_window
        if not arch.is_global(i) and length > window:
            seen = (window * (window + 1) / 2 + (length - window) * window) / length
        flops += 4 * arch.num_heads * arch.layer_head_dim(i) * seen
    return flops


def train_flops_per_token(arch: Architecture, lora: LoraConfig, mean_length: float) -> float:
    """Forward and backward of one real token in segments of `mean_length` tokens, without rematerialisation."""
    if not lora.enabled:
        return 6 * matmul_parameters(arch) + 3 * attention_flops(arch, mean_length)
    base = 4 * matmul_parameters(arch) + 3 * attention_flops(arch, mean_length)
    return base + 6 * lora_parameters(arch, lora)
