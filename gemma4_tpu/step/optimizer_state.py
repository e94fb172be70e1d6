"""Describes the state of any Optax optimizer, array by array: its field, and the trained array that it belongs to.

Optax's states are trees of named tuples around trees shaped like the trained one. The names on the path to an array
identify both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from gemma4_tpu.models.layout import Path


class Part(NamedTuple):
    """One array of an optimizer's state."""

    field: str
    """Optax's name for it, such as `mu`, `v_row` or `count`."""
    path: Path | None
    """Path of the trained array that it belongs to; None: it belongs to all of them."""


def parts(optimizer: Any, trained: Any) -> list[Part]:
    """Describes each leaf of an optimizer's state, in the order of `jax.tree.leaves`."""
    known = {_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    return [_part(path, known) for path, _ in jax.tree_util.tree_leaves_with_path(optimizer)]


def _part(path: tuple[Any, ...], known: set[Path]) -> Part:
    names, fields = _names(path), [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    runs = (names[start:end] for start in range(len(names)) for end in range(len(names), start, -1))
    return Part(fields[-1], next((run for run in runs if run in known), None))


def _names(path: tuple[Any, ...]) -> Path:
    """Keys, numbers and attributes of a path through a tree."""
    kinds = {jax.tree_util.DictKey: "key", jax.tree_util.SequenceKey: "idx", jax.tree_util.GetAttrKey: "name"}
    return tuple(getattr(key, kinds[type(key)]) for key in path)
