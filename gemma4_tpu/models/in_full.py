"""Weights that are trained in full: all of them with `lora=none`, else those that `lora.modules_to_train` names.

Such a weight gets no adapter, is never quantised, and is float32 while it is trained. Among the trained values, it has
the same path as among the base weights. Imports no JAX.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models.weights import LAYER, OUTER, Weight, rows

KINDS = {
    "norms": ("*norm*",),
    "per_layer_projections": ("per_layer_model_projection", "per_layer_input_gate", "per_layer_projection"),
    "embeddings": ("embed_tokens",),
    "projector": ("embed_vision.embedding_projection",),
}
"""Shorthands that `lora.modules_to_train` accepts besides patterns, and the patterns that they stand for."""


def modules_of(weight: Weight) -> list[str]:
    """A weight's names on disk without the layer, as patterns refer to it: `self_attn.q_norm`."""
    return [_module(name) for name in weight.hf_names]


def is_in_full(weight: Weight, lora: LoraConfig) -> bool:
    """Whether a weight is trained in full; one that is stored in several pieces is, if all of them are named."""
    return not lora.enabled or all(_named(name, lora.modules_to_train) for name in weight.hf_names)


def names(lora: LoraConfig) -> frozenset[str]:
    """Names of the rows of `weights.py` that are trained in full."""
    return frozenset(weight.name for weight in (*OUTER, *LAYER) if is_in_full(weight, lora))


def problems(arch: Architecture, lora: LoraConfig) -> list[str]:
    """Problems with `lora.modules_to_train` on a model: names that it lacks, single pieces of a weight."""
    there = [weight for layer in (None, *range(arch.num_layers)) for weight in rows(arch, layer)]
    weights = list({weight.name: weight for weight in there}.values())
    known = sorted({name for weight in weights for name in weight.hf_names})
    kinds = [kind for kind in KINDS if any(_named(name, [kind]) for name in known)]
    messages = [
        f"lora.modules_to_train: {arch.name} has no {wanted!r}; use {', '.join(kinds)}"
        f"{'' if arch.vision else ' (projector only with data.image_cache)'}, or names or patterns of"
        f" {', '.join(map(_module, known))}"
        for wanted in lora.modules_to_train
        if not any(_named(name, [wanted]) for name in known)
    ]
    for weight in weights:
        left = [_module(name) for name in weight.hf_names if not _named(name, lora.modules_to_train)]
        if left and len(left) < len(weight.hf_names):
            messages.append(
                f"lora.modules_to_train: {' and '.join(modules_of(weight))} are one array here; name"
                f" {' and '.join(left)} too, or neither"
            )
    return messages


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _named(name: str, wanted: list[str]) -> bool:
    """Whether a kind, or a shell pattern of the whole name or of its last parts (`q_norm`, `self_attn.*`,
    `*layernorm`), matches.

    A parameter that is not a module of its own matches by its whole name only: `down_proj` is not `experts.down_proj`.
    """
    patterns = [pattern for one in wanted for pattern in KINDS.get(one, (one,))]
    patterns += [f"*.{pattern}" for pattern in patterns if name.endswith(".weight")]
    return any(fnmatchcase(_module(name), pattern) for pattern in patterns)
