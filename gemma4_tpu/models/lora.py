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
from jax.sharding import Mesh

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import sharding
from gemma4_tpu.models.layout import Layout, Leaf, build_tree

ROLES = {
    "attention": ("attn.q_einsum.w", "attn.kv_einsum.w", "attn.k_einsum.w", "attn.attn_vec_einsum.w"),
    "mlp": ("mlp.gate_proj.kernel", "mlp.up_proj.kernel", "mlp.down_proj.kernel"),
}
# Which dims of each weight are contracted with the module's input; the others are output dims.
_INPUT_DIMS = {
    "attn.q_einsum.w": (1,),
    "attn.k_einsum.w": (1,),
    "attn.kv_einsum.w": (2,),
    "attn.attn_vec_einsum.w": (0, 1),
    "mlp.gate_proj.kernel": (0,),
    "mlp.up_proj.kernel": (0,),
    "mlp.down_proj.kernel": (0,),
}


@dataclass(frozen=True)
class Adapter:
    """The pair of arrays beside one (stacked) base weight."""

    base: Leaf
    a: Leaf
    b: Leaf
    fan_in: int


def scale(lora: LoraConfig) -> float:
    """Factor on the adapter's output: alpha/r, or alpha/√r with rsLoRA."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def role_of(leaf: Leaf) -> str | None:
    """`attention` or `mlp` for weights that can be adapted, else None."""
    if not leaf.stacked:
        return None
    name = _local_name(leaf)
    return next((role for role, names in ROLES.items() if name in names), None)


def input_dims(leaf: Leaf) -> tuple[int, ...]:
    """Dims of one (unstacked) adaptable weight that its input is contracted with."""
    return _INPUT_DIMS[_local_name(leaf)]


def _local_name(leaf: Leaf) -> str:
    return leaf.tunix_names[0].split(".", 2)[2]


def adapters(layout: Layout, lora: LoraConfig) -> list[Adapter]:
    """Every adapted weight: all of the targeted roles, global layers' K included. The router and experts have none."""
    found = [_adapter(leaf, lora.rank) for leaf in layout.leaves() if role_of(leaf) in lora.targets]
    if not found:
        raise UserError(f"lora.targets={lora.targets} adapts no module; use some of {sorted(ROLES)}")
    return found


def _adapter(leaf: Leaf, rank: int) -> Adapter:
    inputs = input_dims(leaf)
    in_shape = tuple(leaf.shape[i] for i in inputs)
    out_shape = tuple(n for i, n in enumerate(leaf.shape) if i not in inputs)

    def beside(suffix: str, shape: tuple[int, ...]) -> Leaf:
        path = (*leaf.path[:-1], f"{leaf.path[-1]}_{suffix}")
        return Leaf(path, tuple(f"{n}_{suffix}" for n in leaf.tunix_names), shape, stacked=True)

    return Adapter(leaf, beside("lora_a", (*in_shape, rank)), beside("lora_b", (rank, *out_shape)), math.prod(in_shape))


def leaves(layout: Layout, lora: LoraConfig) -> Iterator[Leaf]:
    """Every array of the LoRA tree."""
    for adapter in adapters(layout, lora):
        yield adapter.a
        yield adapter.b


def shardings(layout: Layout, lora: LoraConfig, mesh: Mesh) -> dict[str, Any]:
    """NamedSharding of every LoRA array."""
    return build_tree(
        (leaf.path, sharding.named(mesh, leaf.tunix_names[0], leaf.shape, stacked=True))
        for leaf in leaves(layout, lora)
    )


def init(layout: Layout, lora: LoraConfig, key: jax.Array) -> dict[str, Any]:
    """Initial adapters in float32: A uniform in ±√(1/fan_in) (PEFT's default), B zero.

    Values depend on the key and each tensor's own name only, not on mesh, stacking or the other tensors.
    """

    def tensor(name: str, shape: tuple[int, ...], bound: float) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.uniform(own, shape, jnp.float32, -bound, bound)

    items = []
    for adapter in adapters(layout, lora):
        bound = math.sqrt(1.0 / adapter.fan_in)
        a = jnp.stack([tensor(name, adapter.a.shape, bound) for name in adapter.a.tunix_names])
        items += [(adapter.a.path, a), (adapter.b.path, jnp.zeros(adapter.b.array_shape, jnp.float32))]
    return build_tree(iter(items))


def parameter_count(layout: Layout, lora: LoraConfig) -> int:
    """Number of trained values."""
    return sum(math.prod(leaf.array_shape) for leaf in leaves(layout, lora))


def module_counts(layout: Layout, lora: LoraConfig) -> dict[str, int]:
    """Adapted modules by kind, such as `{"attn.q_einsum": 60, …}`."""
    counts: dict[str, int] = {}
    for adapter in adapters(layout, lora):
        kind = _local_name(adapter.base).rsplit(".", 1)[0]
        counts[kind] = counts.get(kind, 0) + len(adapter.base.tunix_names)
    return counts
