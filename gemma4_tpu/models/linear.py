"""The linear maps of a layer, and what their adapters add: scale · (x·A)·B.

An adapter's products have r columns or rows, too few to fill a matrix unit. So adapters of the same input share their
first half, x · [A of each], and the result travels between chips once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma4_tpu.models import dora, int8
from gemma4_tpu.models.adapted import Adapted
from gemma4_tpu.models.int8 import Int8Weight
from gemma4_tpu.models.layout import get
from gemma4_tpu.models.quantize import dense
from gemma4_tpu.models.remat import keep
from gemma4_tpu.models.sharding import constrain, gathered
from gemma4_tpu.models.weights import BY_NAME, Weight


@dataclass(frozen=True)
class _AppliedAdapter:
    """One weight's adapter while it runs."""

    weight: Weight
    how: Adapted
    a: jax.Array
    """[inputs…, r]"""
    b: jax.Array
    """[r, outputs…] of the adapted pieces."""
    magnitude: jax.Array | None
    """DoRA's magnitudes."""

    def scaled_b(self, dtype: Any) -> jax.Array:
        """Returns scale · B of all pieces of the weight, with zeros for pieces without an adapter."""
        b, of = self.b * self.how.scale, len(self.weight.hf_names)
        if len(self.how.pieces) < of:
            own = dict(zip(self.how.pieces, jnp.moveaxis(b, 1, 0), strict=True))
            b = jnp.stack([own.get(i, jnp.zeros_like(b[:, 0])) for i in range(of)], axis=1)
        return b.astype(dtype)


@dataclass(frozen=True, kw_only=True)
class LinearMaps:
    """The maps of one layer."""

    params: Mapping[str, Any]
    lora: Mapping[str, Any]
    adapted: Mapping[str, Adapted]
    """How this layer's weights are adapted, by name."""
    in_full: frozenset[str]
    """Names of the weights that are trained themselves."""
    dtype: Any
    """Dtype of the products."""
    mesh: Mesh | None
    dropout: float
    key: jax.Array | None
    """Of this layer's dropout; None: no dropout."""

    def plain(self, name: str, x: jax.Array) -> jax.Array:
        """Returns x · W, without an adapter."""
        weight = BY_NAME[name]
        held = self._held(weight)
        if isinstance(held, Int8Weight):
            return int8.products((weight,), self.mesh, False, x, [held])[0]
        return jnp.einsum(weight.equations[0], x, dense(held, self.dtype))

    def from_model_dim(self, names: Sequence[str], x: jax.Array) -> list[jax.Array]:
        """Maps the same x [B, S, D] to heads or hidden units of all tokens, [B, T, …] each.

        Each chip of the `tp` axis holds its own tokens of the residual stream. First halves of adapters run on these,
        so that no chip repeats them; then x is gathered.
        """
        adapters = {name: found for name in names if (found := self._adapter(name))}
        if not adapters:
            whole = constrain(x, "BTD", self.mesh)
            return [self.plain(name, whole) for name in names]
        low = keep(constrain(self._first_halves(list(adapters.values()), x), "BSD", self.mesh), "low")  # [B, S, Σr]
        made = dict(zip(adapters, self._second_halves(list(adapters.values()), x, low), strict=True))
        if others := [name for name in names if name not in adapters]:
            whole = constrain(x, "BTD", self.mesh)
            made |= {name: self.plain(name, whole) for name in others}
        return [made[name] for name in names]

    def to_model_dim(self, name: str, x: jax.Array) -> jax.Array:
        """Maps heads or hidden units [B, T, …] to the model dim, [B, S, D]."""
        adapter = self._adapter(name)
        if adapter is None:
            return constrain(self.plain(name, x), "BSD", self.mesh)  # reduce-scattered, not all-reduced
        weight, a = adapter.weight, adapter.a.astype(x.dtype)
        y = self._to_model_dim_alone(weight, x)
        low = jnp.einsum(weight.equations[1], self._dropped(weight, x), a)
        low = keep(constrain(low, "BSD", self.mesh), "low")  # [B, S, r]
        return self._turned(adapter, y + jnp.einsum(weight.equations[2], low, adapter.scaled_b(x.dtype)))

    def per_token(self, name: str, x: jax.Array) -> jax.Array:
        """Applies a map whose weight is replicated to a chip's own tokens: [B, S, …] → [B, S, …]."""
        return self.plain(name, x) if self._adapter(name) is None else self.to_model_dim(name, x)

    def _first_halves(self, adapters: list[_AppliedAdapter], x: jax.Array) -> jax.Array:
        """Returns x · A of each adapter, [B, S, Σr]; one product unless dropout masks their inputs differently."""
        factors = [adapter.a.astype(x.dtype) for adapter in adapters]
        if not self._drops:
            return jnp.einsum("btd,dr->btr", x, jnp.concatenate(factors, axis=-1))
        dropped = (self._dropped(adapter.weight, x) for adapter in adapters)
        return jnp.concatenate([jnp.einsum("btd,dr->btr", *pair) for pair in zip(dropped, factors, strict=True)], -1)

    def _second_halves(self, adapters: list[_AppliedAdapter], x: jax.Array, low: jax.Array) -> list[jax.Array]:
        """Returns x · W + low · B of each."""
        weights = tuple(adapter.weight for adapter in adapters)
        ends = list(itertools.accumulate(adapter.how.rank for adapter in adapters))
        shares = jnp.split(constrain(low, "BTD", self.mesh), ends[:-1], axis=-1)
        return [
            self._turned(adapter, y + jnp.einsum(adapter.weight.equations[2], own, adapter.scaled_b(x.dtype)))
            for adapter, y, own in zip(adapters, self._from_model_dim_alone(weights, x), shares, strict=True)
        ]

    def _from_model_dim_alone(self, weights: tuple[Weight, ...], x: jax.Array) -> list[jax.Array]:
        """Returns x · W of adapted weights."""
        if all(isinstance(get(self.params, weight.path), Int8Weight) for weight in weights):
            return int8.products(weights, self.mesh, True, x, [self._held(weight) for weight in weights])
        whole = constrain(x, "BTD", self.mesh)
        return [self.plain(weight.name, whole) for weight in weights]

    def _to_model_dim_alone(self, weight: Weight, x: jax.Array) -> jax.Array:
        """Returns x · W of an adapted weight."""
        return constrain(self.plain(weight.name, x), "BSD", self.mesh)

    def _turned(self, adapter: _AppliedAdapter, y: jax.Array) -> jax.Array:
        """Returns y = x · W + scale · (x·A)·B, with DoRA rescaled to the trained row lengths."""
        if adapter.magnitude is None:
            return y
        weight, how = adapter.weight, adapter.how
        norm = keep(dora.norms(weight, how, dense(self._held(weight), self.dtype), adapter.a, adapter.b), "low")
        return dora.turned(weight, how, adapter.magnitude, norm, y)

    @property
    def _drops(self) -> bool:
        return self.dropout > 0 and self.key is not None

    def _dropped(self, weight: Weight, x: jax.Array) -> jax.Array:
        """The input of an adapter, after dropout."""
        if self.key is None or not self.dropout:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(self.key, weight.fold), 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), 0).astype(x.dtype)

    def _held(self, weight: Weight) -> Any:
        held = get(self.params, weight.path)
        if self.lora and weight.role and weight.name not in self.in_full:  # else its gradient would be gathered
            held = gathered(held, weight, self.mesh)
        return held

    def _adapter(self, name: str) -> _AppliedAdapter | None:
        """The adapter of a weight; None if it has none."""
        weight, beside = BY_NAME[name], self.lora
        *module, last = weight.path
        for part in module:
            beside = beside.get(part, {})
        if f"{last}_lora_a" not in beside:
            return None
        a, b = (beside[f"{last}_lora_{factor}"] for factor in "ab")
        return _AppliedAdapter(weight, self.adapted[name], a, b, beside.get(f"{last}_lora_magnitude"))
