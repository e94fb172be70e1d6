"""Low-rank adapters: which modules get one, their shapes, initial values and how they act.

Names and shapes are Qwix's (`layers.3.attn.q_einsum.w_lora_a`), so adapters move between this project and Tunix + Qwix.
An adapter adds `scale · (x·A)·B` to its module's output; the product A·B never exists.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.models import sharding
from gemma4_tpu.models.adapted import Adapted
from gemma4_tpu.models.layout import Layout, Leaf, build_tree
from gemma4_tpu.models.weights import Weight


@dataclass(frozen=True)
class Adapter:
    """The pair of arrays beside one (stacked) base weight."""

    base: Leaf
    a: Leaf
    b: Leaf
    fan_in: int
    rank: int
    scale: float
    """Factor on its output."""


def adapters(layout: Layout) -> list[Adapter]:
    """Every adapter of the layout."""
    return [_adapter(leaf, leaf.adapted) for leaf in layout.leaves() if leaf.adapted]


def _adapter(leaf: Leaf, how: Adapted) -> Adapter:
    size = dict(zip(leaf.dims, leaf.shape, strict=True)) | {"r": how.rank}

    def beside(factor: str, dims: str) -> Leaf:
        path = (*leaf.path[:-1], f"{leaf.path[-1]}_{factor}")
        names, shape = tuple(f"{name}_{factor}" for name in leaf.tunix_names), tuple(size[dim] for dim in dims)
        return Leaf(path, names, shape, stacked=True, weight=leaf.weight, dims=dims)

    a, b = leaf.weight.adapter_dims
    fan_in = math.prod(size[dim] for dim in leaf.weight.inputs)
    return Adapter(leaf, beside("lora_a", a), beside("lora_b", b), fan_in, how.rank, how.scale)


def product(weight: Weight, lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """A·B of one weight in its own layout in memory."""
    a, b = weight.adapter_dims
    dims = a[:-1] + b[1:]  # of the tensor product over r
    return np.tensordot(lora_a, lora_b, axes=1).transpose([dims.index(dim) for dim in weight.dims])


def leaves(layout: Layout) -> Iterator[Leaf]:
    """Every array of the LoRA tree."""
    for adapter in adapters(layout):
        yield adapter.a
        yield adapter.b


def shardings(layout: Layout, mesh: Mesh) -> dict[str, Any]:
    """NamedSharding of every LoRA array."""
    return build_tree((leaf.path, sharding.named(mesh, leaf)) for leaf in leaves(layout))


def init(layout: Layout, key: jax.Array) -> dict[str, Any]:
    """Initial adapters in float32: A uniform in ±√(1/fan_in) (PEFT's default), B zero.

    Values depend on the key and each tensor's own name only, not on mesh, stacking or the other tensors.
    """

    def tensor(name: str, shape: tuple[int, ...], bound: float) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(own, shape, jnp.float32, -bound, bound)

    items = []
    for adapter in adapters(layout):
        bound = math.sqrt(1.0 / adapter.fan_in)
        a = jnp.stack([tensor(name, adapter.a.shape, bound) for name in adapter.a.tunix_names])
        items += [(adapter.a.path, a), (adapter.b.path, jnp.zeros(adapter.b.array_shape, jnp.float32))]
    return build_tree(iter(items))


def parameter_count(layout: Layout) -> int:
    """Number of trained values."""
    return sum(math.prod(leaf.array_shape) for leaf in leaves(layout))


def module_counts(layout: Layout) -> dict[str, int]:
    """Adapted modules by kind, such as `{"attn.q_einsum": 60, …}`."""
    counts: dict[str, int] = {}
    for adapter in adapters(layout):
        kind = adapter.base.weight.name.rsplit(".", 1)[0]
        counts[kind] = counts.get(kind, 0) + len(adapter.base.tunix_names)
    return counts
