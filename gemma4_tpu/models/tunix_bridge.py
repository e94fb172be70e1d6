"""Loads our base weights into Tunix's own Gemma 4 model, so that Tunix's sampler and trainers can run them.

Training itself does not use this (see `gemma4.py`). Needs Tunix: the extra `tunix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.gemma4 import model as tunix

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.weights import PER_LAYER_TABLE


def tunix_config(arch: Architecture, dtype: Any = jnp.float32) -> tunix.ModelConfig:
    """Tunix's configuration of `arch`; `dtype` applies to parameters and activations.

    Raises:
      UserError: Tunix 0.1.7 cannot express this architecture.
    """
    if arch.per_layer_input_dim and arch.vocab_size_per_layer_input != arch.vocab_size:
        raise UserError(
            f"{arch.name}: Tunix has one vocabulary size, not {arch.vocab_size} and {arch.vocab_size_per_layer_input}"
        )
    kinds = tuple(
        tunix.AttentionType.GLOBAL if arch.is_global(i) else tunix.AttentionType.LOCAL_SLIDING
        for i in range(arch.num_layers)
    )
    shared = arch.num_kv_shared_layers
    fraction = shared / arch.num_layers
    if int(arch.num_layers - fraction * arch.num_layers) != arch.num_unshared_layers:
        # Tunix 0.1.7 converts the fraction back to a number of layers by truncation, which is off by one for some
        # pairs; adding half a layer avoids that.
        fraction = (shared - 0.5) / arch.num_layers
    origins = tunix.create_kv_cache_sharing_patterns(
        num_layers=arch.num_layers, frac_shared_layers=fraction, share_global=True, share_local=True,
        attention_types=kinds,
    )  # fmt: skip
    if origins != [arch.kv_origin(i) for i in range(arch.num_layers)]:
        raise UserError(
            f"{arch.name}: Tunix expects the last unshared layers to be a sliding and then a global one; in this"
            f" architecture they are {arch.layer_types[: arch.num_unshared_layers][-2:]}"
        )
    moe = arch.num_experts > 0
    return tunix.ModelConfig(
        num_layers=arch.num_layers, num_embed=arch.vocab_size, embed_dim=arch.embed_dim, hidden_dim=arch.hidden_dim,
        num_heads=arch.num_heads, head_dim=arch.head_dim, num_kv_heads=arch.num_kv_heads,
        final_logit_softcap=arch.final_logit_softcap, sliding_window_size=arch.sliding_window,
        per_layer_input_dim=arch.per_layer_input_dim,
        num_global_kv_heads=arch.num_global_kv_heads, global_key_size=arch.global_head_dim, attention_pattern=kinds,
        frac_shared_layers=fraction, global_rope_proportion=arch.global_rope_proportion, local_rope_proportion=1.0,
        k_eq_v_global=arch.k_eq_v, override_kv_shared_ffw_hidden=arch.kv_shared_hidden_dim,
        local_base_frequency=arch.local_rope_base, global_base_frequency=arch.global_rope_base,
        local_scale_factor=1.0, global_scale_factor=arch.global_rope_factor, param_dtype=dtype, dtype=dtype,
        enable_moe=moe, num_experts=arch.num_experts if moe else None,
        num_experts_per_tok=arch.experts_per_token if moe else None,
        expert_dim=arch.expert_dim if moe else None, moe_dense_hidden_dim=arch.hidden_dim if moe else None,
    )  # fmt: skip


def to_tunix(params: Mapping[str, jax.Array], arch: Architecture, dtype: Any = jnp.float32) -> tunix.Gemma4:
    """Tunix's model of `arch` with these weights, converted to `dtype`.

    Args:
      params: by Tunix name (`params.by_name`).
      arch: their architecture.
      dtype: of parameters and activations.

    Raises:
      UserError: the model is a mixture of experts, which Tunix 0.1.7 routes wrongly; ValueError: the weights do not
        fit.
    """
    if arch.num_experts:
        # Tunix 0.1.7 feeds the router the experts' normed input instead of the residual: logits are off by more than
        # ten. Fixed after 0.1.7; tests/models/test_tunix_bridge.py tells when this check can go.
        raise UserError(f"{arch.name}: Tunix 0.1.7 routes experts wrongly; its sampler would not run this model")
    return fill(params, arch, dtype)


def fill(params: Mapping[str, jax.Array], arch: Architecture, dtype: Any) -> tunix.Gemma4:
    """Like `to_tunix`, for any architecture. Keys and values that Tunix never reads (KV-shared layers) become zeros."""
    model = nnx.eval_shape(lambda: tunix.Gemma4(tunix_config(arch, dtype), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    unused = set(params)
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name in params:
            value = params[name].astype(dtype)
            if name == PER_LAYER_TABLE:  # [V, L * P] here
                value = value.reshape(-1, arch.num_layers, arch.per_layer_input_dim)
            if value.shape != leaf.get_value().shape:
                raise ValueError(f"{name}: shape {value.shape} where Tunix has {leaf.get_value().shape}")
            unused.discard(name)
        elif _never_read(arch, path):
            value = jnp.zeros(leaf.get_value().shape, dtype)
        else:
            raise ValueError(f"{name}: Tunix's model has this tensor, the weights do not")
        filled.append((path, leaf.replace(value)))
    if unused:
        raise ValueError(f"Tunix's model has no {', '.join(sorted(unused))}")
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _never_read(arch: Architecture, path: tuple[Any, ...]) -> bool:
    match path:
        case ("layers", int(layer), "attn", "kv_einsum" | "k_einsum" | "_key_norm", _):
            return arch.is_kv_shared(layer)
    return False
