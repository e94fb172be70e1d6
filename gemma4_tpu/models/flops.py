"""Analytic FLOP counts: what the model's mathematics needs, whatever a compiler makes of it. No JAX here.

A multiply-add counts as two. Backward passes: activation gradients cost as much as the forward pass; weight gradients
as much again, but only for weights that are trained. LoRA trains almost none, hence 4 FLOPs per parameter and token
instead of 6; and 2 in layers before the first that is adapted, to which no gradient goes back.
"""

from __future__ import annotations

import math

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.names import Tensor, adapted_tensors, name_map
from gemma4_tpu.models.weights import PER_LAYER_TABLE


def matmul_parameters(arch: Architecture, before: int | None = None) -> int:
    """Parameters that each token is multiplied with: active experts only, the output table included.

    `before`: of the layers before this one alone.
    """

    def active(tensor: Tensor) -> int:
        values = math.prod(tensor.shape)
        return values // arch.num_experts * arch.experts_per_token if tensor.weight.each else values

    products = [t for t in name_map(arch).values() if t.weight.inputs and t.name != PER_LAYER_TABLE]
    if before is not None:
        products = [t for t in products if t.name.startswith("layers.") and int(t.name.split(".")[1]) < before]
    return sum(map(active, products))


def lora_parameters(arch: Architecture, lora: LoraConfig) -> int:
    """Trained parameters of the adapters: an A `[r, in]`; for each weight on disk a B `[out, r]` and DoRA's lengths."""
    return _lora_parameters(arch, lora, arch.num_experts)


def _lora_parameters(arch: Architecture, lora: LoraConfig, experts: int) -> int:
    """Those of so many experts of each layer, and of everything else."""
    adapted, count = Layout.of(arch, lora).adapted, 0
    for tensor in adapted_tensors(arch, adapted).values():
        how, outputs = adapted[tensor.name], len(tensor.hf_names) * tensor.hf_shape[-2]
        each = experts if tensor.weight.each else 1
        count += each * (how.rank * (tensor.hf_shape[-1] + outputs) + how.dora * outputs)
    return count


def attention_flops(arch: Architecture, length: float, before: int | None = None) -> float:
    """Scores and weighted values of one forward pass, per token of a segment with `length` tokens (causal mean).

    `before`: of the layers before this one alone.
    """
    flops = 0.0
    for i in range(arch.num_layers if before is None else before):
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
    first = next(i for i, layer in enumerate(Layout.of(arch, lora).of_layers) if layer)
    forward_only = 2 * matmul_parameters(arch, first) + 2 * attention_flops(arch, mean_length, first)
    return base - forward_only + 6 * _lora_parameters(arch, lora, arch.experts_per_token)
