"""The part of `lora.start` that was trained in full (`lora.modules_to_train`, PEFT's `modules_to_save`).

These values replace the base's. Weights that this run trains in full and that were not given start as in the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import in_full, sharding, token_rows
from gemma4_tpu.models.adapter_files import Whole
from gemma4_tpu.models.layout import Layout, Leaf, Path, get
from gemma4_tpu.models.names import Index, Tensor, name_map, some
from gemma4_tpu.training.saved import SavedState


@dataclass(frozen=True)
class StartInFull:
    """Fully trained weights to start from."""

    lora: LoraConfig
    given: Mapping[str, Whole]
    """By name on disk, without prefix."""

    def problems(self, arch: Architecture) -> list[str]:
        """Why this run cannot start from them; empty: it can."""
        tensors = name_map(arch).values()
        every = {name: tensor for tensor in tensors for name in tensor.hf_names}
        there = {name: tensor for name, tensor in every.items() if name in self.given}
        lines = []
        if token_rows.NAME in self.given:
            lines.append(
                "it trained rows of new tokens (model.new_tokens), which are no adapters; merge it and give"
                " model.path=<merged folder>"
            )
        if alien := sorted(self.given.keys() - every.keys() - {token_rows.NAME}):
            lines.append(f"{len(alien)} of its whole modules are none of {arch.name}'s text model ({some(alien)})")
        if left := sorted(n for n, tensor in there.items() if not in_full.is_in_full(tensor.weight, self.lora)):
            modules = dict.fromkeys(module for n in left for module in in_full.modules_of(there[n].weight))
            wanted = ",".join([*self.lora.modules_to_train, *modules])
            lines.append(
                f"lora.modules_to_train leaves out {len(left)} weights that it trained in full ({some(left)}); give"
                f" lora.modules_to_train=[{wanted}]"
            )
        if wrong := [f"{name} {list(self.given[name].shape)} instead of {list(tensor.hf_shape)}"
                     for name, tensor in there.items() if self.given[name].shape != tensor.hf_shape]:  # fmt: skip
            lines.append(f"{len(wrong)} of its weights have another shape: {some(wrong)}; it is another model's")
        if part := [name for name, tensor in there.items() if not self.given.keys() >= set(tensor.hf_names)]:
            lines.append(f"it trained {some(part)} in full, but not what is one array with it here (K and V)")
        return lines

    def place(self, initial: Any, layout: Layout, mesh: Mesh) -> Iterator[tuple[Path, jax.Array]]:
        """Yields path and value of every array that is trained in full: given layers over the `initial` ones."""
        tensors = name_map(layout.arch)
        for leaf in layout.trained_in_full():
            parts = [self._value(tensors[name]) for name in leaf.tunix_names]
            array = get(initial, leaf.path)
            yield leaf.path, array if all(part is None for part in parts) else _over(array, parts, leaf, mesh)
        if (rows := initial.get("embedder", {}).get(token_rows.PATH[-1])) is not None:
            yield token_rows.PATH, rows

    def _value(self, tensor: Tensor) -> np.ndarray | None:
        """The given value of a tensor, in its in-memory layout; None: not given."""
        return tensor.from_hf(self._read) if tensor.hf_names[0] in self.given else None

    def _read(self, name: str, index: Index, shape: tuple[int, ...]) -> np.ndarray:
        value = self.given[name].read()
        if not np.isfinite(value).all():
            raise UserError(f"lora.start={self.lora.start}: {name} holds NaN or infinity; give another")
        return value.reshape(shape)[tuple(index)]


def of_run(state: SavedState, arch: Architecture) -> dict[str, Whole]:
    """The weights that a run trained in full."""
    tensors, found = name_map(arch), {}
    for name in (name for name in state.names if not name.endswith(("_lora_a", "_lora_b", "_lora_magnitude"))):
        if (tensor := tensors.get(name)) is None or state.shape(name) != tensor.shape:
            found[name] = Whole(state.shape(name), partial(state.read, name))  # another model's
        else:
            found |= {hf: Whole(tensor.hf_shape, partial(_piece, state, tensor, hf)) for hf in tensor.hf_names}
    return found


def _piece(state: SavedState, tensor: Tensor, hf_name: str) -> np.ndarray:
    return tensor.to_hf(state.read(tensor.name))[hf_name]


def _over(initial: jax.Array, parts: list[np.ndarray | None], leaf: Leaf, mesh: Mesh) -> jax.Array:
    """A stacked array `[R, …]` with the given layers (not None) over the initial ones."""
    values = np.stack([np.zeros(leaf.shape, np.float32) if part is None else part for part in parts])
    given = np.array([part is not None for part in parts])
    values, given = (values, given) if leaf.stacked else (values[0], given[0])
    place = sharding.named(mesh, leaf)
    placed = jax.make_array_from_callback(values.shape, place, lambda index: values[index])

    def merge(initial: jax.Array, placed: jax.Array) -> jax.Array:
        return jnp.where(given.reshape(-1, *[1] * len(leaf.shape)) if leaf.stacked else given, placed, initial)

    return jax.jit(merge, out_shardings=place)(initial, placed)
