"""Low-rank adapters: their modules, shapes and initial values, and how they act.

Names and shapes are Qwix's (`layers.3.attn.q_einsum.w_lora_a`), so adapters are interchangeable with Tunix + Qwix. An
adapter adds `scale · (x·A)·B` to its module's output; the product A·B is never materialised.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.models import dora, sharding, token_rows
from gemma4_tpu.models.adapted import Adapted
from gemma4_tpu.models.layout import Layout, Leaf, build_tree, get
from gemma4_tpu.models.quantize import dense
from gemma4_tpu.models.weights import Weight


@dataclass(frozen=True)
class Adapter:
    """The adapter arrays of one (stacked) base weight."""

    base: Leaf
    how: Adapted
    """Its rank and scale; the same for the whole stack."""
    a: Leaf
    b: Leaf
    magnitude: Leaf | None
    """DoRA's magnitudes."""
    fan_in: int

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Its arrays."""
        return (self.a, self.b, *([self.magnitude] if self.magnitude else []))


def adapters(layout: Layout) -> list[Adapter]:
    """Every adapter of the layout."""
    return [found for leaf in layout.leaves() if (found := adapter_of(leaf))]


def adapter_of(leaf: Leaf) -> Adapter | None:
    """The adapter of some base weights; None if they have none."""
    if (how := leaf.adapted) is None:
        return None
    size = dict(zip(leaf.dims, leaf.shape, strict=True)) | {"r": how.rank}
    if len(leaf.weight.hf_names) > 1:
        size["c"] = len(how.pieces)

    def beside(factor: str, dims: str) -> Leaf:
        path = (*leaf.path[:-1], f"{leaf.path[-1]}_{factor}")
        names, shape = tuple(f"{name}_{factor}" for name in leaf.tunix_names), tuple(size[dim] for dim in dims)
        return Leaf(path, names, shape, stacked=True, weight=leaf.weight, dims=dims)

    a, b = leaf.weight.adapter_dims
    fan_in = math.prod(size[dim] for dim in leaf.weight.inputs)
    magnitude = beside("lora_magnitude", leaf.weight.outputs) if how.dora else None
    return Adapter(leaf, how, beside("lora_a", a), beside("lora_b", b), magnitude, fan_in)


def product(weight: Weight, lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """A·B of one weight in its in-memory layout: of B's pieces, or per expert."""
    a, b = weight.adapter_dims
    each = len(weight.each)
    made = lora_a.reshape(*lora_a.shape[:each], -1, lora_a.shape[-1]) @ lora_b.reshape(*lora_b.shape[: each + 1], -1)
    dims = a[:-1] + b[each + 1 :]
    made = made.reshape(*lora_a.shape[:-1], *lora_b.shape[each + 1 :])
    return made.transpose([dims.index(dim) for dim in weight.dims])


def merged(weight: Weight, how: Adapted, base: np.ndarray, factors: Sequence[np.ndarray]) -> np.ndarray:
    """A weight (its adapted pieces) with the adapter merged, in its in-memory layout; `factors`: A, B, DoRA's
    magnitudes.
    """
    lora_a, lora_b, *magnitude = factors
    whole = base + how.scale * product(weight, lora_a, lora_b)
    return dora.scaled(weight, whole, *magnitude) if magnitude else whole


def factors(layout: Layout) -> list[Leaf]:
    """Every A and B."""
    return [leaf for adapter in adapters(layout) for leaf in (adapter.a, adapter.b)]


def leaves(layout: Layout) -> Iterator[Leaf]:
    """Every array of the LoRA tree."""
    for adapter in adapters(layout):
        yield from adapter.leaves


def trained_leaves(layout: Layout, new_tokens: int = 0) -> list[Leaf]:
    """Every array that training changes: adapters, weights trained in full, token rows."""
    rows = len(token_rows.trained_alone(layout, range(new_tokens)))
    return [*leaves(layout), *layout.trained_in_full(), *([token_rows.leaf(layout, rows)] if rows else [])]


def shardings(layout: Layout, mesh: Mesh) -> dict[str, Any]:
    """NamedSharding of every LoRA array."""
    return build_tree((leaf.path, sharding.named(mesh, leaf)) for leaf in leaves(layout))


def init(layout: Layout, key: jax.Array, base: Any = None, begun: Any = None) -> dict[str, Any]:
    """Initial adapters in float32: A uniform in ±√(1/fan_in) (PEFT's default) and B zero, or both as in `begun`.

    DoRA's magnitudes start as the row lengths of `base` with A and B. Values depend only on the key and each tensor's
    own name, not on mesh, stacking or other tensors.
    """

    def tensor(name: str, shape: tuple[int, ...], bound: float) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(own, shape, jnp.float32, -bound, bound)

    items = []
    for adapter in adapters(layout):
        if begun:
            a, b = (get(begun, leaf.path) for leaf in (adapter.a, adapter.b))
        else:
            bound = math.sqrt(1.0 / adapter.fan_in)
            a = jnp.stack([tensor(name, adapter.a.shape, bound) for name in adapter.a.tunix_names])
            b = jnp.zeros(adapter.b.array_shape, jnp.float32)
        items += [(adapter.a.path, a), (adapter.b.path, b)]
        if adapter.magnitude:
            items.append((adapter.magnitude.path, magnitudes(adapter, get(base, adapter.base.path), a, b)))
    return build_tree(iter(items))


def magnitudes(adapter: Adapter, base: Any, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """DoRA's initial magnitudes for stacked weights (possibly quantised) and these A and B; one layer at a time."""

    def of_layer(arrays: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = arrays
        return dora.norms(adapter.base.weight, adapter.how, dense(weight, jnp.float32), a, b)

    return jax.lax.map(of_layer, (base, lora_a, lora_b))


def parameter_count(layout: Layout) -> int:
    """Number of adapter parameters."""
    return sum(math.prod(leaf.array_shape) for leaf in leaves(layout))


def module_counts(layout: Layout) -> dict[str, int]:
    """Adapted modules by kind, such as `{"attn.q_einsum": 60, …}`."""
    counts: dict[str, int] = {}
    for adapter in adapters(layout):
        weight, pieces = adapter.base.weight, adapter.how.pieces
        kind = weight.name if weight.each else weight.name.rsplit(".", 1)[0]
        if len(pieces) < len(weight.hf_names):
            kind += f" ({', '.join(str(weight.modules[i]) for i in pieces)})"
        counts[kind] = counts.get(kind, 0) + len(adapter.base.tunix_names)
    return counts
