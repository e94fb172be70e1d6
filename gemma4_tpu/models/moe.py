"""The mixture-of-experts block of 26B-A4B: routes each token to its experts, runs them grouped, adds up the results.

The router reads the raw residual, the experts the normed input (as in transformers; Tunix 0.1.7 feeds the router the
normed input).

On a mesh, every chip holds a slice of the hidden units of *all* experts: tokens travel (some MB), experts stay in place
(1.5 GB per layer), and the work is the same on every chip whatever the router chooses.

Each expert can have its own adapter, which adds `scale · (x·A)·B` to its rows. PEFT adds B·A to the weights instead,
which needs the gradient of every whole expert. Here, all experts' pairs are concatenated: E·r columns of one A and as
many rows of one B. A row is multiplied with all of them, and a mask keeps what belongs to its own expert. That is E
times the arithmetic of grouped products, yet far faster: E·r is less than the model dim, grouped products of such small
matrices leave a matrix unit almost empty, and the TPU compiler turns their gradients into one product over all rows per
expert. At the model dim, even the k experts of a token share one product, because tokens have not been repeated there
yet.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from qwix import QArray

from gemma4_tpu.models.grouped import InStack, grouped
from gemma4_tpu.models.layout import without
from gemma4_tpu.models.remat import keep
from gemma4_tpu.models.sharding import activation_spec, axes_of, fit
from gemma4_tpu.models.weights import BY_NAME, Weight

Params = dict[str, Any]
Adapters = dict[str, tuple[jax.Array, jax.Array]]
"""A `[E, in, r]` and B `[E, r, out]`, scaled, of `gating_einsum` and `linear`; empty if the experts have none."""

SCOPE = "experts_lora"
"""Part of the names of the adapters' products, by which a plan distinguishes them from the experts' own."""


def route(p: Params, residual: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    """Selects the experts of each token and their weights. residual [S, D] → ids [S, k], weights [S, k] float32.

    Scores are computed in float32: rounding could break ties differently and pick another expert.
    """
    x = residual.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    x = x * p["router_scale"].astype(jnp.float32) * x.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(x @ p["router_logits"].astype(jnp.float32), axis=-1)
    _, ids = jax.lax.top_k(jax.lax.stop_gradient(probabilities), experts_per_token)
    chosen = ids[..., None] == jnp.arange(probabilities.shape[-1])  # [S, k, E]; the gradient of top_k would scatter
    weights = jnp.where(chosen, probabilities[:, None], 0.0).sum(axis=-1)
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights * p["per_expert_scale"].astype(jnp.float32)[ids]


def run_experts(
    p: Params, lora: Adapters, x: jax.Array, ids: jax.Array, weights: jax.Array, hidden_axes: tuple[str, ...] = ()
) -> jax.Array:
    """Weighted sum of each token's experts. x [S, D], ids and weights [S, k] → [S, D].

    Tokens are sorted by expert, so that a grouped product multiplies each expert's rows with its own matrix. `p` can
    hold a slice of the hidden units, split over `hidden_axes`; the result is then that slice's share of the sum.

    The adapters' model-dim ends are also split over these axes (if they divide it), so that no chip repeats another's
    products.
    """
    experts, _, hidden, dim = p["gating_einsum"].shape
    k = ids.shape[1]
    order, back, group_sizes = (keep(a, "routing") for a in _sort(ids.reshape(-1), experts))
    chosen = _Chosen(ids, order, back, experts)
    rows = _dispatch(k, x, order, back)  # [S*k, D]
    both = grouped(rows, p["gating_einsum"], group_sizes, last=True)  # [S*k, 2F]
    if "gating_einsum" in lora:
        with jax.named_scope(SCOPE):
            both = both + _from_model_dim(lora["gating_einsum"], x, chosen, hidden_axes)
    both = keep(both, "experts_gate_up")
    act = jax.nn.gelu(both[:, :hidden], approximate=True) * both[:, hidden:]
    act = act * _permute(weights.reshape(-1), order, back).astype(act.dtype)[:, None]
    out = grouped(act, p["linear"], group_sizes, last=False)  # [S*k, D]
    out = _collect(k, out, order, back)
    if "linear" in lora:
        with jax.named_scope(SCOPE):
            added = _to_model_dim(lora["linear"], act, chosen, dim, hidden_axes)
            own = _own(out, added.shape[1], hidden_axes) + added
            out = jax.lax.dynamic_update_slice_in_dim(out, own, _start(out, added.shape[1], hidden_axes), axis=1)
    return out


@dataclass(frozen=True)
class _Chosen:
    """Which experts serve which token, as masks of ones and zeros."""

    ids: jax.Array
    """[S, k]"""
    order: jax.Array
    """See `_sort`."""
    back: jax.Array
    experts: int

    def of_tokens(self, dtype: Any) -> jax.Array:
        """[S, k, E]"""
        return jax.nn.one_hot(self.ids, self.experts, dtype=dtype)

    def of_rows(self, dtype: Any) -> jax.Array:
        """One row per token and chosen expert, in expert order, [S*k, E]."""
        return jax.nn.one_hot(self.ids.reshape(-1)[self.order], self.experts, dtype=dtype)


def _from_model_dim(
    adapter: tuple[jax.Array, jax.Array], x: jax.Array, chosen: _Chosen, axes: tuple[str, ...]
) -> jax.Array:
    """Output of the adapters of gate and up. x [S, D] → [S*k, 2F] in expert order."""
    a, b = (factor.astype(x.dtype) for factor in adapter)  # [E, D, r], [E, r, 2, F]; D can be split
    low = jnp.einsum("td,edr->ter", _own(x, a.shape[1], axes), a)
    low = jnp.einsum("tke,ter->tkr", chosen.of_tokens(x.dtype), low).reshape(len(x), -1)
    low = keep(low if a.shape[1] == x.shape[1] else jax.lax.psum(low, axes), "low")  # [S, k*r]
    low = _permute(low.reshape(-1, a.shape[2]), chosen.order, chosen.back)  # [S*k, r]
    low = jnp.einsum("ne,nr->ner", chosen.of_rows(x.dtype), low)
    return jnp.einsum("ner,ercx->ncx", low, b).reshape(len(low), -1)


def _to_model_dim(
    adapter: tuple[jax.Array, jax.Array], act: jax.Array, chosen: _Chosen, dim: int, axes: tuple[str, ...]
) -> jax.Array:
    """Output of the adapters of down; this chip's columns of it if D = `dim` is split.

    act [S*k, F] in expert order → [S, D].
    """
    a, b = (factor.astype(act.dtype) for factor in adapter)  # [E, F, r], [E, r, D]
    tokens, k = chosen.ids.shape
    low = jnp.einsum("nx,exr->ner", act, a)
    low = jnp.einsum("ne,ner->nr", chosen.of_rows(act.dtype), low)
    low = _permute(low, chosen.back, chosen.order).reshape(tokens, -1)
    low = keep(low if b.shape[2] == dim else jax.lax.psum(low, axes), "low")  # [S, k*r]
    low = jnp.einsum("tke,tkr->ter", chosen.of_tokens(act.dtype), low.reshape(tokens, k, -1))
    return jnp.einsum("ter,erd->td", low, b)


def _own(x: jax.Array, width: int, axes: tuple[str, ...]) -> jax.Array:
    """This chip's columns of x [N, D], where each chip along `axes` has `width` of them."""
    return jax.lax.dynamic_slice_in_dim(x, _start(x, width, axes), width, axis=1)


def _start(x: jax.Array, width: int, axes: tuple[str, ...]) -> jax.Array | int:
    """Start of these columns."""
    return 0 if width == x.shape[1] else jax.lax.axis_index(axes) * width


def _sort(ids: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Expert ids [N] → indices in expert order [N], the position of each index in that order [N], and rows per expert
    [E].

    The second inverts the first. It is counted instead of sorted, because a sort takes the TPU compiler six seconds.
    """
    chosen = (ids[:, None] == jnp.arange(experts)).astype(jnp.float32)  # [N, E]; counts are exact below 2**24
    block = math.gcd(len(ids), 128)
    blocks = chosen.reshape(-1, block, experts)
    sizes = blocks.sum(axis=1)  # [N/block, E]
    totals = sizes.sum(axis=0)  # [E]
    earlier_in_block = jnp.einsum("ij,bje->bie", jnp.tri(block, k=-1), blocks, precision=jax.lax.Precision.HIGHEST)
    earlier_blocks = jnp.cumsum(sizes, axis=0) - sizes
    earlier_experts = jnp.cumsum(totals) - totals
    before = earlier_in_block + earlier_blocks[:, None] + earlier_experts
    back = (before.reshape(chosen.shape) * chosen).sum(axis=1).astype(jnp.int32)
    return jnp.argsort(ids, stable=True).astype(jnp.int32), back, totals.astype(jnp.int32)


# Dispatch and collect are each other's transpose; written out, all four directions gather where autodiff would scatter.
def _repeat(k: int, x: jax.Array, order: jax.Array) -> jax.Array:
    return x[order // k]


def _add_up(k: int, rows: jax.Array, back: jax.Array) -> jax.Array:
    # By the TPU compiler's cycles, `sum` takes three times as long over [S, k, D], and five times over [k, S, D].
    each = rows[back.reshape(-1, k).T]  # [k, S, D]
    out = sum((each[j].astype(jnp.float32) for j in range(1, k)), each[0].astype(jnp.float32)).astype(rows.dtype)
    # Where nothing splits the tokens, the TPU compiler prefers them as the minor dim of what follows, and would
    # transpose all k rows of each token before it adds them up (4,096 tokens of 26B-A4B on a v5p chip: 0.6 ms).
    return with_layout_constraint(out, Layout((0, 1)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(k: int, x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Repeats each token's vector k times, in expert order. x [S, D] → [S*k, D]."""
    return _repeat(k, x, order)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(k: int, rows: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Each token's sum over its k experts. rows [S*k, D] in expert order → [S, D]."""
    return _add_up(k, rows, back)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """x[order]; `back` is the inverse."""
    return x[order]


_dispatch.defvjp(
    lambda k, x, order, back: (_repeat(k, x, order), back), lambda k, back, g: (_add_up(k, g, back), None, None)
)
_collect.defvjp(
    lambda k, rows, order, back: (_add_up(k, rows, back), order), lambda k, order, g: (_repeat(k, g, order), None, None)
)
_permute.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))


def frozen_experts(layers: list[Params], in_full: Collection[str]) -> tuple[list[Params], list[Params]]:
    """Stacked layers without the experts that can be read in place, and these alone.

    Experts trained in full need gradients, and quantised ones are dequantised in each layer, so neither can.
    """
    names = [weight.path[-1] for weight in BY_NAME.values() if weight.each and weight.name not in in_full]
    stacks = [
        {name: own["moe"][name] for name in names if "moe" in own and not isinstance(own["moe"][name], QArray)}
        for own in layers
    ]
    return without(layers, {(j, "moe", name) for j, own in enumerate(stacks) for name in own}), stacks


def with_experts(layer: Params, stacks: Params, repeat: jax.Array, mesh: Mesh | None) -> Params:
    """One layer's weights, with its experts from these stacks."""
    if not stacks:
        return layer
    interpret = mesh is None or mesh.devices.flat[0].platform != "tpu"
    own = {name: InStack(stack, repeat, interpret) for name, stack in stacks.items()}
    return {**layer, "moe": {**layer["moe"], **own}}


def moe(
    p: Params, lora: Adapters, residual: jax.Array, normed: jax.Array, experts_per_token: int, mesh: Mesh | None
) -> jax.Array:
    """residual, normed [B, S, D] → [B, S, D]. `p` can hold quantised weights."""
    if mesh is None:
        return _share(p, lora, residual, normed, experts_per_token)
    tokens = activation_spec("BSD", residual.shape, mesh)
    rows = {name: BY_NAME[f"moe.{name}"] for name in p}

    def places(row: Weight, dims: str, array: Any) -> Any:  # of a quantised weight: for its values and its scales
        if isinstance(array, InStack):
            return replace(array, stack=P(None, *fit(row.axes_of(dims), array.shape, mesh)), layer=P())
        return jax.tree.map(lambda x: fit(row.axes_of(dims), x.shape, mesh), array)

    weights = {name: places(row, row.dims, p[name]) for name, row in rows.items()}
    factors = {name: tuple(map(partial(places, rows[name]), rows[name].adapter_dims, ab)) for name, ab in lora.items()}
    hidden = axes_of(fit(rows["linear"].axes_of("x"), p["linear"].shape[1:2], mesh)[0])
    if not hidden:  # a chip that has all hidden units processes only its own tokens, and uses whole adapters
        factors = jax.tree.map(lambda _: P(), lora)
    gathered = tuple(a for dim in tokens[:2] for a in axes_of(dim) if a in hidden)
    block = partial(_share, experts_per_token=experts_per_token, hidden=hidden, gathered=gathered)
    specs = (weights, factors, tokens, tokens)
    return jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(p, lora, residual, normed)


def _share(
    p: Params,
    lora: Adapters,
    residual: jax.Array,
    normed: jax.Array,
    experts_per_token: int,
    hidden: tuple[str, ...] = (),
    gathered: tuple[str, ...] = (),
) -> jax.Array:
    """One chip's part: routes its own tokens, runs its slice of the experts on all tokens, and adds up.

    Args:
      p: the router, and a slice of the experts' hidden units.
      lora: adapters of that slice.
      residual: [B, S, D] this chip's tokens.
      normed: as residual.
      experts_per_token: k.
      hidden: mesh axes that split hidden units; results are summed over them.
      gathered: those of them that also split tokens; tokens are gathered and results scattered over them.
    """
    shape = residual.shape
    ids, weights = route(p, residual.reshape(-1, shape[-1]), experts_per_token)
    x = normed.reshape(-1, shape[-1])
    if gathered:
        x, ids, weights = (jax.lax.all_gather(a, gathered, axis=0, tiled=True) for a in (x, ids, weights))
    out = run_experts(p, lora, x, ids, weights, hidden)
    if summed := tuple(a for a in hidden if a not in gathered):
        out = jax.lax.psum(out, summed)
    if gathered:
        out = jax.lax.psum_scatter(out, gathered, scatter_dimension=0, tiled=True)
    return keep(out.reshape(shape), "experts_out")
