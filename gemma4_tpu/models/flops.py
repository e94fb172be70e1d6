"""Analytic FLOP counts: what the model's mathematics needs, whatever a compiler makes of it. No JAX here.

A multiply-add counts as two. Backward passes: activation gradients cost as much as the forward pass; weight gradients
as much again, but only for weights that are trained. LoRA trains almost none, hence 4 FLOPs per parameter and token
instead of 6.
"""

from __future__ import annotations

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig


def matmul_parameters(arch: Architecture) -> int:
    """Parameters that each token is multiplied with: active experts only, the output table included."""
    d = arch.embed_dim
    total = arch.vocab_size * d
    for i in range(arch.num_layers):
        heads, width = arch.num_heads, arch.layer_head_dim(i)
        total += 2 * d * heads * width + 3 * d * arch.layer_hidden_dim(i)
        if not arch.is_kv_shared(i):
            projections = 1 if arch.is_global(i) and arch.k_eq_v else 2
            total += projections * d * arch.layer_kv_heads(i) * width
        if arch.num_experts:
            total += d * arch.num_experts + arch.experts_per_token * 3 * d * arch.expert_dim
        total += 2 * d * arch.per_layer_input_dim
    return total + d * arch.num_layers * arch.per_layer_input_dim


def lora_parameters(arch: Architecture, lora: LoraConfig) -> int:
    """Trained parameters of the adapters (see `models/lora.py` for the modules)."""
    d, r, total = arch.embed_dim, lora.rank, 0
    for i in range(arch.num_layers):
        wide = arch.num_heads * arch.layer_head_dim(i)
        if "attention" in lora.targets:
            total += 2 * r * (d + wide)
            if not arch.is_kv_shared(i):
                projections = 1 if arch.is_global(i) and arch.k_eq_v else 2
                total += r * (d + projections * arch.layer_kv_heads(i) * arch.layer_head_dim(i))
        if "mlp" in lora.targets:
            total += 3 * r * (d + arch.layer_hidden_dim(i))
    return total


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
