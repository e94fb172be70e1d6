"""Gemma 4's forward pass as pure functions over parameter trees.

Parameters have Tunix's names and shapes (see `layout.py`), adapters Qwix's (see `lora.py`). Tests compare this with
Tunix's own modules and with transformers. Training does not run Tunix's modules because they discard segment ids,
cannot scan over layers, and reach adapters only through one intercepted method.

Dims: B rows, T tokens, D model, N query heads, K key/value heads, H head width, F hidden units, L layers, P per-layer
embedding, V vocabulary, I features of a picture, r adapter rank, R repeats of a stage.

S is T split over the `tp` axis: each chip keeps the residual stream of its own tokens (sequence parallelism). With the
whole stream on every chip, all chips would repeat the same norms, residuals and first halves of adapters, and sums over
heads and hidden units would need an all-reduce. Split, the sums are reduce-scattered and then gathered before the next
product: the same number of bytes, with the work in between shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.models.attention import einsum_attention, rope
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.linear import LinearMaps
from gemma4_tpu.models.moe import Adapters, frozen_experts, moe, with_experts
from gemma4_tpu.models.remat import keep, rematerialised
from gemma4_tpu.models.sharding import constrain

Params = dict[str, Any]
KV = tuple[jax.Array, jax.Array]
Visit = Callable[["Layer", jax.Array, jax.Array | None, KV | None, Any], tuple[jax.Array, KV, Any]]
"""`visit(layer, x, per-layer input, shared KV, the layer's extra state)` → x, its KV for later layers, and a value to
collect.
"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that is fixed at compile time: the architecture, its adapters and how to run them."""

    layout: Layout
    compute_dtype: Any = jnp.bfloat16
    lora_dropout: float = 0.0
    remat: str = "none"
    """A policy of `remat.py`."""
    attention: Callable[..., jax.Array] = einsum_attention
    mesh: Mesh | None = None
    expert_kernel: bool = False
    """Grouped products use a TPU kernel that reads frozen experts in place, see `grouped.py`."""
    token_rows: tuple[int, ...] = ()
    """Rows of the embedding that are trained by themselves, see `token_rows.py`."""

    @property
    def arch(self) -> Architecture:
        return self.layout.arch


@dataclass(frozen=True)
class Layer:
    """One layer while it runs: its weights and adapters, the rows it sees and its dropout key."""

    model: Model
    number: int
    """Number of a layer with the same structure (they differ only in weights)."""
    params: Params
    lora: Params
    segment_ids: jax.Array
    positions: jax.Array
    key: jax.Array | None
    """Of this layer's dropout; None: no dropout."""
    in_loop: bool
    """The layer runs inside `lax.scan`."""
    apart: int
    """Passed to `remat.keep` for what it keeps for the backward pass."""

    def keep(self, x: jax.Array, name: str) -> jax.Array:
        """Marks an array that a remat policy can keep."""
        return keep(x, name, self.apart)

    @property
    def maps(self) -> LinearMaps:
        """Its linear maps."""
        model = self.model
        return LinearMaps(
            params=self.params,
            lora=self.lora,
            adapted=dict(model.layout.of_layers[self.number]),
            in_full=model.layout.in_full,
            dtype=model.compute_dtype,
            mesh=model.mesh,
            dropout=model.lora_dropout,
            key=self.key,
        )

    @property
    def is_global(self) -> bool:
        return self.model.arch.is_global(self.number)

    @property
    def is_kv_shared(self) -> bool:
        return self.model.arch.is_kv_shared(self.number)


def rms_norm(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Returns x / rms(x) · scale, computed in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if scale is not None:
        wide = wide * scale.astype(jnp.float32)
    return wide.astype(x.dtype)


def _attention(layer: Layer, x: jax.Array, shared_kv: KV | None) -> tuple[jax.Array, KV]:
    """Maps x [B, S, D] → output [B, S, D] and the keys and values used, [B, T, K, H] each."""
    model, arch, p = layer.model, layer.model.arch, layer.params["attn"]
    rotate = partial(rope, positions=layer.positions, base=arch.local_rope_base)
    if layer.is_global:
        rotate = partial(
            rope, positions=layer.positions, base=arch.global_rope_base, proportion=arch.global_rope_proportion,
            factor=arch.global_rope_factor,
        )  # fmt: skip
    of_kv = [] if shared_kv is not None else ["attn.k_einsum.w" if "k_einsum" in p else "attn.kv_einsum.w"]
    q, *made = layer.maps.from_model_dim(["attn.q_einsum.w", *of_kv], x)
    q = layer.keep(constrain(q, "BTNH", model.mesh), "query")
    q = rotate(rms_norm(q, p["_query_norm"]["scale"]))
    if shared_kv is not None:
        k, v = shared_kv
    else:
        if "k_einsum" in p:  # the key projection doubles as the value projection
            k = v = layer.keep(constrain(made[0], "BTNH", model.mesh), "key_value")
        else:
            k, v = layer.keep(constrain(made[0], "2BTNH", model.mesh), "key_value")
        k, v = rotate(rms_norm(k, p["_key_norm"]["scale"])), rms_norm(v, None)  # values: no scale, no positions
    window = None if layer.is_global else arch.sliding_window
    out = constrain(model.attention(q, k, v, layer.segment_ids, window), "BTNH", model.mesh)
    return layer.keep(layer.maps.to_model_dim("attn.attn_vec_einsum.w", out), "attended"), (k, v)


def _mlp(layer: Layer, x: jax.Array) -> jax.Array:
    """Gated MLP, [B, S, D] → [B, S, D]."""
    made = layer.maps.from_model_dim(["mlp.gate_proj.kernel", "mlp.up_proj.kernel"], x)
    gate, up = (layer.keep(constrain(y, "BTF", layer.model.mesh), "gate_up") for y in made)
    out = layer.maps.to_model_dim("mlp.down_proj.kernel", jax.nn.gelu(gate, approximate=True) * up)
    return layer.keep(out, "mlp_out")


def _of_experts(layer: Layer) -> Adapters:
    """Adapters of a layer's experts."""
    given, found = layer.lora.get("moe", {}), {}
    for name in ("gating_einsum", "linear"):
        if f"{name}_lora_a" in given:
            how = layer.model.layout.adapted[f"layers.{layer.number}.moe.{name}"]
            found[name] = given[f"{name}_lora_a"], given[f"{name}_lora_b"] * how.scale
    return found


def decoder_layer(
    layer: Layer, x: jax.Array, per_layer_input: jax.Array | None, shared_kv: KV | None
) -> tuple[jax.Array, KV]:
    """Maps x [B, S, D], per_layer_input [B, S, P] → x [B, S, D] and this layer's keys and values."""
    p, model = layer.params, layer.model

    attended, kv = _attention(layer, rms_norm(x, p["pre_attention_norm"]["scale"]), shared_kv)
    x = x + rms_norm(attended, p["post_attention_norm"]["scale"])

    out = _mlp(layer, rms_norm(x, p["pre_ffw_norm"]["scale"]))
    if model.arch.num_experts:  # in addition to the dense MLP; the router reads x itself
        out = rms_norm(out, p["dense_post_ffw_norm"]["scale"])
        normed = rms_norm(x, p["moe_pre_ffw_norm"]["scale"])
        mixed = moe(p["moe"], _of_experts(layer), x, normed, model.arch.experts_per_token, model.mesh)
        out = out + rms_norm(mixed, p["moe_post_ffw_norm"]["scale"])
    x = x + rms_norm(out, p["post_ffw_norm"]["scale"])

    if per_layer_input is not None:
        gate = layer.keep(layer.maps.per_token("per_layer_input_gate.w", x), "per_layer")  # [B, S, P]
        gated = jax.nn.gelu(gate, approximate=True) * per_layer_input
        added = layer.keep(layer.maps.per_token("per_layer_projection.w", gated), "per_layer")
        x = x + rms_norm(added, p["post_per_layer_input_norm"]["scale"])

    return constrain(x * p["skip_scale"].astype(x.dtype), "BSD", model.mesh), kv


def _embed(
    model: Model, p: Params, tokens: jax.Array, features: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Maps tokens [B, T] → x [B, S, D] and, for E2B/E4B, per-layer inputs [L, B, S, P]."""
    dtype, vision, soft = model.compute_dtype, model.arch.vision, None
    if features is not None and vision is not None:
        soft = (tokens == vision.image_token)[..., None]
        tokens = jnp.where(soft[..., 0], vision.pad_token, tokens)
        # Applied at every token: the projector is cheap compared with a layer, and no index crosses chips.
        features = rms_norm(features.astype(dtype), None)
        seen = jnp.einsum("bti,id->btd", features, p["mm_input_projection"]["w"].astype(dtype))
    # Factors are rounded to the compute dtype, as in transformers: √5376 is 73.5 in bfloat16.
    x = jnp.take(p["input_embedding"], tokens, axis=0).astype(dtype)
    x = constrain(x * jnp.sqrt(jnp.float32(x.shape[-1])).astype(dtype), "BSD", model.mesh)
    if soft is not None:
        x = jnp.where(soft, constrain(seen, "BSD", model.mesh), x)
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
    features: jax.Array | None = None,
) -> jax.Array:
    """Computes the final hidden states of packed rows.

    Args:
      model: architecture and settings.
      params: base weights as laid out by `Layout`.
      lora: adapters; None uses the base model alone.
      tokens: [B, T] int32.
      segment_ids: [B, T] int32; 0 is padding; tokens see only their own segment.
      positions: [B, T] int32, from 0 in each segment.
      dropout_key: None switches adapter dropout off (evaluation).
      features: [B, T, I] of the vision tower, read only at tokens `arch.vision.image_token`. None: there are no
        pictures.

    Returns:
      [B, S, D] in `model.compute_dtype`, normalised, ready for `logits`.
    """

    def visit(layer: Layer, x: jax.Array, per_layer_input: Any, shared_kv: Any, _: Any) -> tuple[jax.Array, KV, None]:
        run = rematerialised(partial(decoder_layer, layer), model.remat, in_loop=layer.in_loop, apart=layer.apart)
        return *run(x, per_layer_input, shared_kv), None

    given = (model, params, lora, tokens, segment_ids, positions, visit)
    return through_layers(*given, dropout_key=dropout_key, features=features)[0]


def through_layers(
    model: Model,
    params: Params,
    lora: Params | None,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    visit: Visit,
    *,
    dropout_key: jax.Array | None = None,
    beside: list[list[Any]] | None = None,
    features: jax.Array | None = None,
) -> tuple[jax.Array, list[list[Any]]]:
    """Like `hidden_states`, with `visit` run at each layer: the only place where training and decoding differ.

    `beside` holds the extra state that `visit` gets with each layer, by stage and layer of its group, stacked like the
    weights. The values that it collects are returned in the same form.
    """
    x, per_layer = _embed(model, params["embedder"], tokens, features)
    shared: dict[str, KV] = {}
    collected = []
    for s, stage in enumerate(model.layout.stages):
        numbers = jnp.asarray(stage.layers, jnp.int32)  # [R, J]
        nothing: list[Any] = [{} for _ in stage.layers[0]]
        in_loop = stage.repeats > 1
        apart = sum(other.repeats == stage.repeats for other in model.layout.stages[:s]) if in_loop else 0
        sliced = params["stages"][s]
        in_place = nothing
        if model.expert_kernel and in_loop:
            sliced, in_place = frozen_experts(sliced, model.layout.in_full)
        slices = (
            jnp.arange(stage.repeats),
            sliced,
            _of_stage(lora, s, len(nothing)),
            numbers,
            None if per_layer is None else per_layer[numbers],  # [R, J, B, S, P]
            beside[s] if beside else nothing,
        )

        def group(x, slices, stage=stage, shared=shared, in_place=in_place, in_loop=in_loop, apart=apart):
            repeat, weights, adapters, numbers, inputs, others = slices
            kvs: dict[str, KV] = {}
            found = []
            for j, number in enumerate(stage.layers[0]):
                # Keyed by the layer's own number, not by its place in a stage, so that a mask does not depend on the
                # stacking.
                key = None if dropout_key is None else jax.random.fold_in(dropout_key, numbers[j])
                held = with_experts(weights[j], in_place[j], repeat, model.mesh)
                layer = Layer(model, number, held, adapters[j], segment_ids, positions, key, in_loop, apart)
                kind = model.arch.layer_types[number]
                shared_kv = shared[kind] if layer.is_kv_shared else None
                x, kvs[kind], own = visit(layer, x, None if inputs is None else inputs[j], shared_kv, others[j])
                found.append(own)
            return x, (found, kvs if stage.exports_kv else {})

        if not in_loop:  # without a loop, so that later stages can read its keys and values
            x, (found, kvs) = group(x, jax.tree.map(lambda a: a[0], slices))
            found = jax.tree.map(lambda a: a[None], found)
            shared = kvs or shared
        else:
            x, (found, _) = jax.lax.scan(group, x, slices)
        collected.append(found)
    return rms_norm(x, params["final_norm"]["scale"]), collected


def _of_stage(lora: Params | None, s: int, layers: int) -> list[Params]:
    """The adapters of each layer of a stage's group; the tree ends with the last layer that has some."""
    stages = lora["stages"] if lora else []
    own = list(stages[s]) if s < len(stages) else []
    return own + [{}] * (layers - len(own))


def logits(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
    """Maps hidden [B, T, D] → float32 logits [B, T, V], for evaluation and tests; training never forms them all."""
    table = params["embedder"]["input_embedding"].astype(hidden.dtype)
    hidden = constrain(hidden, "BTD", model.mesh)
    scores = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
    return softcap(constrain(scores, "BTV", model.mesh), model.arch.final_logit_softcap)


def softcap(scores: jax.Array, cap: float | None) -> jax.Array:
    """tanh(scores / cap) · cap."""
    return scores if cap is None else jnp.tanh(scores / cap) * cap
