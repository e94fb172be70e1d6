"""Analytic FLOP counts: what the model's mathematics requires, regardless of the compiler. Imports no JAX.

A multiply-add counts as two FLOPs. In the backward pass, activation gradients cost as much as the forward pass, and
weight gradients as much again, but only for trained weights: 6 FLOPs per parameter and token, and 4 for frozen ones.
LoRA trains almost none, and the layers before the first trained one take 2, because no gradient reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.names import Tensor, adapted_tensors, name_map
from gemma4_tpu.models.weights import PER_LAYER_TABLE, rows


def matmul_parameters(arch: Architecture, only: Callable[[Tensor], bool] = lambda _: True) -> int:
    """Parameters that each token is multiplied with: active experts only, the output table included.

    `only` selects some of the weights.
    """

    def active(tensor: Tensor) -> int:
        values = math.prod(tensor.shape)
        return values // arch.num_experts * arch.experts_per_token if tensor.weight.each else values

    tensors = (t for t in name_map(arch).values() if only(t))
    products = (t for t in tensors if t.weight.inputs and t.name != PER_LAYER_TABLE)
    return sum(map(active, products))


def lora_parameters(arch: Architecture, lora: LoraConfig, experts: int | None = None) -> int:
    """Trained parameters of the adapters: an A `[r, in]`, and for each weight on disk a B `[out, r]` and DoRA's
    lengths. `experts`: how many of each layer count; None: all.
    """
    adapted, count = Layout.of(arch, lora).adapted, 0
    for tensor in adapted_tensors(arch, adapted).values():
        how, outputs = adapted[tensor.name], len(tensor.hf_names) * tensor.hf_shape[-2]
        each = (arch.num_experts if experts is None else experts) if tensor.weight.each else 1
        count += each * (how.rank * (tensor.hf_shape[-1] + outputs) + how.dora * outputs)
    return count


def attention_flops(arch: Architecture, length: float, before: int | None = None) -> float:
    """FLOPs of scores and weighted values in one forward pass, per token of a segment of `length` tokens (causal mean).

    `before` counts only the layers before this one.
    """
    flops = 0.0
    for i in range(arch.num_layers if before is None else before):
        seen = (length + 1) / 2
        window = arch.sliding_window
        if not arch.is_global(i) and length > window:
            seen = (window * (window + 1) / 2 + (length - window) * window) / length
        flops += 4 * arch.num_heads * arch.layer_head_dim(i) * seen
    return flops


def train_flops_per_token(
    arch: Architecture,
    lora: LoraConfig,
    mean_length: float,
    token_rows: bool = False,
    beside: Architecture | None = None,
) -> float:
    """FLOPs of the forward and backward passes per real token in segments of `mean_length` tokens, without
    rematerialisation.

    Args:
      arch: the model.
      lora: what is trained.
      mean_length: of the segments, in tokens.
      token_rows: some rows of the embedding are trained as well, see `token_rows.py`.
      beside: another model whose forward pass runs along, such as a teacher.
    """
    layout = Layout.of(arch, lora)
    first = 0 if token_rows else _first_trained_layer(layout)
    before = tuple(f"layers.{layer}." for layer in range(first))
    below = matmul_parameters(arch, lambda t: t.name.startswith(before))
    forward_only = 2 * below + 2 * attention_flops(arch, mean_length, first)
    in_full = matmul_parameters(arch, lambda t: t.weight.name in layout.in_full)
    base = 4 * matmul_parameters(arch) + 3 * attention_flops(arch, mean_length)
    if beside is not None:
        base += 2 * matmul_parameters(beside) + attention_flops(beside, mean_length)
    return base - forward_only + 2 * in_full + 6 * lora_parameters(arch, lora, arch.experts_per_token)


def _first_trained_layer(layout: Layout) -> int:
    """The layer down to which gradients flow; trained parts of the embedder, per-layer inputs included, are below all
    layers.
    """
    arch, in_full = layout.arch, layout.in_full
    if any(weight.path[0] == "embedder" and weight.name in in_full for weight in rows(arch)):
        return 0
    return next(
        layer
        for layer, adapters in enumerate(layout.of_layers)
        if adapters or any(weight.name in in_full for weight in rows(arch, layer))
    )
