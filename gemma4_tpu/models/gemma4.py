"""Gemma 4's forward pass as pure functions over parameter trees.

Parameters carry Tunix's names and shapes (see `layout.py`), adapters Qwix's (see `lora.py`). Tunix's own modules are a
reference that this is tested against, beside transformers; training does not run them because they discard segment
ids, cannot scan over layers, and see adapters only through one intercepted method.

Dims: B rows, T tokens, D model, N query heads, K key/value heads, H head width, F hidden units, L layers,
P per-layer embedding, V vocabulary, r adapter rank, R repeats of a stage; S is T split over the `tp` axis: norms and
residuals work on their own tokens, products on all (sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import Mesh

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.models import quantize
from gemma4_tpu.models.attention import einsum_attention, rope
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.moe import moe
from gemma4_tpu.models.remat import keep, rematerialised
from gemma4_tpu.models.sharding import constrain, gathered

Params = dict[str, Any]
KV = tuple[jax.Array, jax.Array]

# base equation, lora_a equation, lora_b equation; dims in lower case, c = (key, value)
_EQUATIONS = {
    "q_einsum": ("btd,ndh->btnh", "btd,dr->btr", "btr,rnh->btnh"),
    "kv_einsum": ("btd,ckdh->cbtkh", "btd,dr->btr", "btr,rckh->cbtkh"),
    "k_einsum": ("btd,kdh->btkh", "btd,dr->btr", "btr,rkh->btkh"),
    "attn_vec_einsum": ("btnh,nhd->btd", "btnh,nhr->btr", "btr,rd->btd"),
    "gate_proj": ("btd,df->btf", "btd,dr->btr", "btr,rf->btf"),
    "up_proj": ("btd,df->btf", "btd,dr->btr", "btr,rf->btf"),
    "down_proj": ("btf,fd->btd", "btf,fr->btr", "btr,rd->btd"),
}
_MODULE_ORDER = {name: i for i, name in enumerate(_EQUATIONS)}  # fixes each module's dropout key


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is fixed while a program is compiled: the architecture and how to run it."""

    arch: Architecture
    compute_dtype: Any = jnp.bfloat16
    lora_scale: float = 1.0
    lora_dropout: float = 0.0
    remat: str = "none"
    """A policy of `remat.py`."""
    attention: Callable[..., jax.Array] = einsum_attention
    mesh: Mesh | None = None

    @property
    def layout(self) -> Layout:
        return Layout.of(self.arch)


@dataclass(frozen=True)
class _Layer:
    """One layer at work: its weights, adapters, dropout key and the rows it sees."""

    model: Model
    number: int
    """A layer of the same structure (they differ only in weights)."""
    params: Params
    lora: Params
    key: jax.Array | None
    segment_ids: jax.Array
    positions: jax.Array

    @property
    def is_global(self) -> bool:
        return self.model.arch.is_global(self.number)


def rms_norm(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """X / rms(x) · scale, computed in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


def _project(layer: _Layer, block: str, module: str, x: jax.Array, whole: jax.Array | None = None) -> jax.Array:
    """The adapted linear map `module` of `block` (`attn` or `mlp`) on x.

    Maps out of the residual stream take x [B, S, D] and the same as `whole` [B, T, D]: their adapter's first half works
    on x, so that no chip repeats it. Maps into it take x split by heads or hidden units and give [B, S, D].
    """
    model, inward = layer.model, whole is None
    base_eq, a_eq, b_eq = _EQUATIONS[module]
    weight = "w" if module.endswith("einsum") else "kernel"
    held = layer.params[block][module][weight]
    if layer.lora:  # frozen: a trained weight's gradient would be gathered, too
        held = gathered(held, f"{module}.{weight}", model.mesh)
    y = jnp.einsum(base_eq, x if inward else whole, _dense(held, model.compute_dtype))
    y = constrain(y, "BSD", model.mesh) if inward else y
    adapter = layer.lora.get(block, {}).get(module)
    if adapter is None:
        return y
    if model.lora_dropout and layer.key is not None:
        key = jax.random.fold_in(layer.key, _MODULE_ORDER[module])
        kept = jax.random.bernoulli(key, 1.0 - model.lora_dropout, x.shape)
        x = jnp.where(kept, x / (1.0 - model.lora_dropout), 0).astype(x.dtype)
    low = jnp.einsum(a_eq, x, adapter[f"{weight}_lora_a"].astype(x.dtype)) * model.lora_scale
    low = keep(constrain(low, "BSD", model.mesh), "low")  # [B, S, r]
    low = low if inward else constrain(low, "BTD", model.mesh)
    return y + jnp.einsum(b_eq, low, adapter[f"{weight}_lora_b"].astype(x.dtype))


def _dense(weight: Any, dtype: Any) -> jax.Array:
    """A base weight in the compute dtype; quantised ones (QLoRA) are dequantised for this use only."""
    return quantize.dequantize(weight, dtype) if isinstance(weight, qwix.QArray) else weight.astype(dtype)


def _attention(layer: _Layer, x: jax.Array, shared_kv: KV | None) -> tuple[jax.Array, KV]:
    """X [B, S, D] → output [B, S, D] and the keys and values used, [B, T, K, H] each."""
    model, arch, p = layer.model, layer.model.arch, layer.params["attn"]
    rotate = partial(rope, positions=layer.positions, base=arch.local_rope_base)
    if layer.is_global:
        rotate = partial(
            rope, positions=layer.positions, base=arch.global_rope_base, proportion=arch.global_rope_proportion,
            factor=arch.global_rope_factor,
        )  # fmt: skip
    whole = constrain(x, "BTD", model.mesh)
    q = keep(constrain(_project(layer, "attn", "q_einsum", x, whole), "BTNH", model.mesh), "query")
    q = rotate(rms_norm(q, p["_query_norm"]["scale"]))
    if shared_kv is not None:
        k, v = shared_kv
    else:
        if "k_einsum" in p:  # the key projection is the value projection too
            k = v = keep(constrain(_project(layer, "attn", "k_einsum", x, whole), "BTNH", model.mesh), "key_value")
        else:
            k, v = keep(constrain(_project(layer, "attn", "kv_einsum", x, whole), "2BTNH", model.mesh), "key_value")
        k, v = rotate(rms_norm(k, p["_key_norm"]["scale"])), rms_norm(v, None)
    window = None if layer.is_global else arch.sliding_window
    out = constrain(model.attention(q, k, v, layer.segment_ids, window), "BTNH", model.mesh)
    return keep(_project(layer, "attn", "attn_vec_einsum", out), "attended"), (k, v)


def _mlp(layer: _Layer, x: jax.Array) -> jax.Array:
    """Gated MLP, [B, S, D] → [B, S, D]."""
    mesh = layer.model.mesh
    whole = constrain(x, "BTD", mesh)
    gate = keep(constrain(_project(layer, "mlp", "gate_proj", x, whole), "BTF", mesh), "gate_up")
    up = keep(constrain(_project(layer, "mlp", "up_proj", x, whole), "BTF", mesh), "gate_up")
    return keep(_project(layer, "mlp", "down_proj", jax.nn.gelu(gate, approximate=True) * up), "mlp_out")


def _decoder_layer(
    layer: _Layer, x: jax.Array, per_layer_input: jax.Array | None, shared_kv: KV | None
) -> tuple[jax.Array, KV]:
    """X [B, S, D], per_layer_input [B, S, P] → x [B, S, D] and this layer's keys and values."""
    p, model = layer.params, layer.model

    attended, kv = _attention(layer, rms_norm(x, p["pre_attention_norm"]["scale"]), shared_kv)
    x = x + rms_norm(attended, p["post_attention_norm"]["scale"])

    out = _mlp(layer, rms_norm(x, p["pre_ffw_norm"]["scale"]))
    if model.arch.num_experts:
        out = rms_norm(out, p["dense_post_ffw_norm"]["scale"])
        normed = rms_norm(x, p["moe_pre_ffw_norm"]["scale"])
        mixed = moe(p["moe"], x, normed, model.arch.experts_per_token, model.mesh)
        out = out + rms_norm(mixed, p["moe_post_ffw_norm"]["scale"])
    x = x + rms_norm(out, p["post_ffw_norm"]["scale"])

    if per_layer_input is not None:
        gate = keep(jnp.einsum("btd,dp->btp", x, p["per_layer_input_gate"]["w"].astype(x.dtype)), "per_layer")
        gated = jax.nn.gelu(gate, approximate=True) * per_layer_input
        added = jnp.einsum("btp,pd->btd", gated, p["per_layer_projection"]["w"].astype(x.dtype))
        x = x + rms_norm(keep(added, "per_layer"), p["post_per_layer_input_norm"]["scale"])

    return constrain(x * p["skip_scale"].astype(x.dtype), "BSD", model.mesh), kv


def _embed(model: Model, p: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Tokens [B, T] → x [B, S, D] and, for E2B/E4B, per-layer inputs [L, B, S, P]."""
    dtype = model.compute_dtype
    x = jnp.take(p["input_embedding"], tokens, axis=0).astype(dtype)
    x = constrain(x * jnp.sqrt(jnp.float32(x.shape[-1])).astype(dtype), "BSD", model.mesh)
    if not model.arch.per_layer_input_dim:
        return x, None
    projected = jnp.einsum("btd,dlp->lbtp", x, p["per_layer_model_projection"]["w"].astype(dtype))
    projected = rms_norm(projected * model.arch.embed_dim**-0.5, p["per_layer_projection_norm"]["scale"])
    looked_up = jnp.take(p["per_layer_input_embedding"], tokens, axis=0).astype(dtype)  # [B, T, L * P]
    looked_up = looked_up.reshape(*tokens.shape, model.arch.num_layers, model.arch.per_layer_input_dim)
    looked_up = looked_up * jnp.sqrt(jnp.float32(model.arch.per_layer_input_dim)).astype(dtype)
    inputs = (projected + jnp.moveaxis(looked_up, 2, 0)) * jnp.float32(2**-0.5).astype(dtype)
    return x, constrain(inputs, "LBSP", model.mesh)


def hidden_states(
    model: Model,
    params: Params,
    lora: Params | None,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states of packed rows.

    Args:
      model: architecture and settings.
      params: base weights as laid out by `Layout`.
      lora: adapters, or None for the base model alone.
      tokens: [B, T] int32.
      segment_ids: [B, T] int32; 0 is padding; tokens see only their own segment.
      positions: [B, T] int32, from 0 in each segment.
      dropout_key: None switches adapter dropout off (evaluation).

    Returns:
      [B, S, D] in `model.compute_dtype`, normalised, ready for `logits`.
    """
    x, per_layer = _embed(model, params["embedder"], tokens)
    shared: dict[str, KV] = {}
    for s, stage in enumerate(model.layout.stages):
        stage_params = params["stages"][s]
        stage_lora = lora["stages"][s] if lora else [{} for _ in stage_params]
        numbers = jnp.asarray(stage.layers, jnp.int32)  # [R, J]
        inputs = None if per_layer is None else per_layer[numbers]  # [R, J, B, T, P]

        def group(x, slices, stage=stage, shared=shared):
            weights, adapters, numbers, inputs = slices
            kvs: dict[str, KV] = {}
            for j, number in enumerate(stage.layers[0]):
                key = None if dropout_key is None else jax.random.fold_in(dropout_key, numbers[j])
                layer = _Layer(model, number, weights[j], adapters[j], key, segment_ids, positions)
                kind = model.arch.layer_types[number]
                run = rematerialised(partial(_decoder_layer, layer), model.remat, in_loop=stage.repeats > 1)
                own_inputs = None if inputs is None else inputs[j]
                x, kvs[kind] = run(x, own_inputs, shared[kind] if model.arch.is_kv_shared(number) else None)
            return x, kvs

        slices = (stage_params, stage_lora, numbers, inputs)
        if stage.repeats == 1:
            x, kvs = group(x, jax.tree.map(lambda a: a[0], slices))
            if stage.exports_kv:
                shared = kvs
        else:

            def once(x: jax.Array, s: Any, group: Any = group) -> tuple[jax.Array, None]:
                return group(x, s)[0], None

            x, _ = jax.lax.scan(once, x, slices)
    return rms_norm(x, params["final_norm"]["scale"])


def logits(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
    """Hidden [B, T, D] → float32 logits [B, T, V]. For evaluation and tests; training never forms them whole."""
    table = params["embedder"]["input_embedding"].astype(hidden.dtype)
    hidden = constrain(hidden, "BTD", model.mesh)
    scores = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    return softcap(constrain(scores, "BTV", model.mesh), model.arch.final_logit_softcap)


def softcap(scores: jax.Array, cap: float | None) -> jax.Array:
    """tanh(scores / cap) · cap."""
    return scores if cap is None else jnp.tanh(scores / cap) * cap
