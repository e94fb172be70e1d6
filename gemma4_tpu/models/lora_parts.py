"""PiSSA and OLoRA: adapters that start as a part of their weight, which is subtracted from the frozen weight.

With W [out, in] applied as W·x, and s the scale of the adapter, training starts from A₀ and B₀ on W - s·B₀·A₀:

    PiSSA (arXiv 2404.02948)    B₀·A₀ = the largest r singular values of W, over s; half of each in A₀ and in B₀
    OLoRA (arXiv 2406.01775)    B₀ = Q, A₀ = R of the QR decomposition of W, their first r columns and rows

as in PEFT. Whatever A₀ and B₀ are, the model equals the base at first, up to rounding of the remainder of W. The
singular values can therefore come from subspace iteration, which takes a few products with W (a full decomposition of
one weight of 31B takes longer than loading the model). Factors are kept with the run's checkpoints: the trained weight
is W + s·(B·A - B₀·A₀). Weights are processed in place, one layer at a time in float32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemma4_tpu.models import sharding
from gemma4_tpu.models.adapted import Adapted
from gemma4_tpu.models.dora import of_pieces
from gemma4_tpu.models.layout import Leaf, Path, build_tree
from gemma4_tpu.models.lora import adapter_of
from gemma4_tpu.models.weights import Weight

ITERATIONS = 8
"""Iterations of the subspace, with two products each. The error of a singular value falls with the 16th power of its
ratio to the first one that the subspace has no room for.
"""
SPARE = 16
"""Dims of the subspace beyond the rank."""


class Parts:
    """Subtracts the adapters' part from weights as they are loaded, and keeps it."""

    def __init__(self, init: str, mesh: Mesh, key: jax.Array, saved: Callable[[str], np.ndarray] | None = None):
        """Prepares for one of the two initialisations.

        Args:
          init: `lora.init`, `pissa` or `olora`.
          mesh: where the weights are.
          key: for the random start of the subspace iteration.
          saved: A₀ and B₀ that the run started from, by name; None: it starts now.
        """
        self._init, self._mesh, self._key, self._saved = init, mesh, key, saved
        self._taken: dict[Path, jax.Array] = {}

    @property
    def factors(self) -> dict[str, Any]:
        """A₀ and B₀ of all weights so far, in the tree of trained values."""
        return build_tree(iter(self._taken.items()))

    def take(self, leaf: Leaf, weight: jax.Array) -> jax.Array:
        """The remainder of stacked weights `[R, …]`; weights without an adapter are unchanged."""
        if (adapter := adapter_of(leaf)) is None:
            return weight
        places = tuple(sharding.named(self._mesh, factor) for factor in (adapter.a, adapter.b))
        if self._saved is None:
            seeds = jnp.asarray([zlib.crc32(name.encode()) for name in adapter.a.tunix_names], jnp.uint32)
            find = _finder(leaf.weight, adapter.how, self._init, places)
            a, b = find(weight, jax.vmap(jax.random.fold_in, (None, 0))(self._key, seeds))
        else:
            a, b = (self._on_mesh(factor.tunix_names, place) for factor, place in
                    zip((adapter.a, adapter.b), places, strict=True))  # fmt: skip
        self._taken |= {adapter.a.path: a, adapter.b.path: b}
        return _remover(leaf.weight, adapter.how, sharding.named(self._mesh, leaf))(weight, a, b)

    def _on_mesh(self, names: tuple[str, ...], place: NamedSharding) -> jax.Array:
        assert self._saved is not None
        value = np.stack([self._saved(name) for name in names])
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


@cache
def _finder(row: Weight, how: Adapted, init: str, places: tuple[NamedSharding, ...]) -> Any:
    """Compiled once for all identical positions of the layer pattern."""
    return jax.jit(partial(_factors, row, how, init), out_shardings=places)


@cache
def _remover(row: Weight, how: Adapted, place: NamedSharding) -> Any:
    return jax.jit(partial(_lacking, row, how), out_shardings=place, donate_argnums=0)


def _factors(row: Weight, how: Adapted, init: str, weights: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A₀ `[R, …, r]` and B₀ `[R, r, …]` of weights `[R, …]`, in float32."""
    find = {"pissa": _pissa, "olora": _olora}[init]

    def of_layer(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight, key = given
        w = _Products(row, of_pieces(row, weight.astype(jnp.float32), how.pieces))
        a, b = find(w, how.rank, how.scale, key)
        return a.reshape(*w.inputs, -1), b.T.reshape(-1, *w.outputs)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(of_layer, (weights, keys))


class _Products:
    """Products of one weight with slim matrices. It keeps its dims, so that a mesh can split them; slim matrices are
    not split.
    """

    def __init__(self, row: Weight, weight: jax.Array):
        size = dict(zip(row.dims, weight.shape, strict=True))
        self._row, self._weight = row, weight
        self.inputs, self.outputs = ([size[dim] for dim in dims] for dims in (row.inputs, row.outputs))
        self.shape = math.prod(self.outputs), math.prod(self.inputs)
        """Shape of W: (out, in)."""

    def out(self, slim: jax.Array) -> jax.Array:
        """W·x for x `[in, q]`."""
        row, slim = self._row, slim.reshape(*self.inputs, -1)
        made = jnp.einsum(f"{row.dims},{row.inputs}q->{row.outputs}q", self._weight, slim)
        return made.reshape(self.shape[0], -1)

    def back(self, slim: jax.Array) -> jax.Array:
        """Wᵀ·y for y `[out, q]`."""
        row, slim = self._row, slim.reshape(*self.outputs, -1)
        made = jnp.einsum(f"{row.dims},{row.outputs}q->{row.inputs}q", self._weight, slim)
        return made.reshape(self.shape[1], -1)


def _pissa(w: _Products, rank: int, scale: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A₀ᵀ `[in, r]` and B₀ `[out, r]`."""
    room = min(rank + SPARE, *w.shape)

    def turn(_: int, left: jax.Array) -> jax.Array:
        return jnp.linalg.qr(w.out(jnp.linalg.qr(w.back(left))[0]))[0]

    left = jnp.linalg.qr(w.out(jax.random.normal(key, (w.shape[1], room), jnp.float32)))[0]
    left = jax.lax.fori_loop(0, ITERATIONS, turn, left)  # [out, q], orthonormal
    right, values, turned = jnp.linalg.svd(w.back(left), full_matrices=False)  # W ≈ left·turnedᵀ·values·rightᵀ
    half = jnp.sqrt(values[:rank] / scale)
    return right[:, :rank] * half, (left @ turned.T)[:, :rank] * half


def _olora(w: _Products, rank: int, scale: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A₀ᵀ `[in, r]` and B₀ `[out, r]`, independent of the scale. Q's first r columns follow from W's, and R is Qᵀ·W."""
    left = jnp.linalg.qr(w.out(jnp.eye(w.shape[1], rank)))[0]
    return w.back(left), left


def _lacking(row: Weight, how: Adapted, weights: jax.Array, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """W - scale·A₀·B₀ `[R, …]` in W's dtype."""
    a, b = row.adapter_dims

    def of_layer(given: tuple[jax.Array, ...]) -> jax.Array:
        weight, own_a, own_b = given
        part = how.scale * jnp.einsum(f"{a},{b}->{row.dims}", own_a, own_b)
        if len(row.hf_names) > 1:
            pieces = jnp.asarray(how.pieces)
            left = weight[pieces].astype(jnp.float32) - part
            return weight.at[pieces].set(left.astype(weight.dtype))
        return (weight.astype(jnp.float32) - part).astype(weight.dtype)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(of_layer, (weights, lora_a, lora_b))
