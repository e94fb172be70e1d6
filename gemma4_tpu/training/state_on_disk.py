"""The state of a run as a checkpoint holds it: flat, by tensor.

Every tensor has its own per-layer name (`layers.7.attn.q_einsum.w_lora_a`), whatever the mesh or the stacking in
memory. `trained` are the values that the run stands for; where those are an average, `current` are the ones that
updates continue from.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma4_tpu.models.layout import Leaf, build_tree, get
from gemma4_tpu.models.layout import Path as TreePath
from gemma4_tpu.step.optimizer_state import Part, parts
from gemma4_tpu.step.train_step import TrainState


def to_disk(state: TrainState, leaves: list[Leaf]) -> dict[str, Any]:
    """The state as flat dicts from tensor name to array; scalar fields of the optimizer state as they are.

    Counters are not saved, because each equals the number of updates.
    """
    evaluated = state.evaluated()
    disk: dict[str, Any] = {"trained": unstack(evaluated, leaves)}
    if evaluated is not state.trained:
        disk["current"] = unstack(state.trained, leaves)
    by_path = {leaf.path: leaf for leaf in leaves}
    fields: dict[str, dict[TreePath, jax.Array]] = {}
    for part, array in _saved_parts(state):
        if part.path is None:
            disk[part.field] = array
        else:
            fields.setdefault(part.field, {})[part.path] = array
    for field, arrays in fields.items():
        own = [by_path[path] for path in arrays]
        disk[field] = unstack(build_tree(iter(arrays.items())), own)
    return disk | {"update": state.update, "key": jax.random.key_data(state.key)}


def from_disk(disk: dict[str, Any], like: TrainState, leaves: list[Leaf]) -> TrainState:
    """Inverse of `to_disk`; `like` is the state before the first update."""
    saved, current = (_stack(disk[name], leaves, like.trained) for name in ("trained", _current(disk)))
    by_path, update = {leaf.path: leaf for leaf in leaves}, disk["update"]

    def restored(part: Part, initial: jax.Array) -> jax.Array:
        if _is_counter(initial):
            return _like(initial + update, initial)
        if part.path is None:
            return disk[part.field]
        return _like(_joined(disk[part.field], by_path[part.path]), initial)

    initial, tree = jax.tree.flatten(like.optimizer)
    optimizer = jax.tree.unflatten(tree, map(restored, parts(like.optimizer, like.trained), initial))
    key = jax.random.wrap_key_data(disk["key"], impl=jax.random.key_impl(like.key))
    average = None if like.average is None else saved
    state = TrainState(current, optimizer, update, key, average)
    return jax.tree.map(lambda x: jnp.copy(x) if x.ndim == 0 else x, state)  # an array may be donated only once


def _current(disk: dict[str, Any]) -> str:
    return "current" if "current" in disk else "trained"


def _saved_parts(state: TrainState) -> list[tuple[Part, jax.Array]]:
    """What is saved of the optimizer's state: all but counters."""
    arrays = jax.tree.leaves(state.optimizer)
    named = zip(parts(state.optimizer, state.trained), arrays, strict=True)
    return [(part, array) for part, array in named if not _is_counter(array)]


def _is_counter(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _like(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.device_put(x, y.sharding)


@partial(jax.jit, static_argnums=1)
def _slices(tree: Any, leaves: tuple[Leaf, ...]) -> dict[str, jax.Array]:
    flat: dict[str, jax.Array] = {}
    for leaf in leaves:
        array = get(tree, leaf.path)
        if leaf.stacked:
            flat |= {name: array[r] for r, name in enumerate(leaf.tunix_names)}
        else:
            flat[leaf.tunix_names[0]] = array
    return flat


def unstack(tree: Any, leaves: list[Leaf]) -> dict[str, jax.Array]:
    """Name of a tensor → its array, of a tree whose layers are stacked."""
    return _slices(tree, tuple(leaves))


def _stack(flat: dict[str, jax.Array], leaves: list[Leaf], like: Any) -> Any:
    return build_tree((leaf.path, _like(_joined(flat, leaf), get(like, leaf.path))) for leaf in leaves)


def _joined(flat: dict[str, jax.Array], leaf: Leaf) -> jax.Array:
    return jnp.stack([flat[n] for n in leaf.tunix_names]) if leaf.stacked else flat[leaf.tunix_names[0]]


def state_bytes(state: TrainState) -> int:
    """Bytes of the trained values, the optimizer's state and the average, from arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state.trained, state.optimizer, state.average)))


def saved_bytes(state: TrainState, leaves: Iterable[Leaf]) -> int:
    """Bytes of one checkpoint, from shapes."""
    disk = jax.eval_shape(partial(to_disk, leaves=list(leaves)), state)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(disk))
