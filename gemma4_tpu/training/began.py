"""The initial values of adapters that start as a part of their weights (PiSSA, OLoRA), and how they are used later.

A run trains on W - s·B₀·A₀, so A and B by themselves fit a base that nobody has. A₀ and B₀ are saved once, next to the
checkpoints. With them, a checkpoint is equivalent to plain adapters on W, of twice the rank:

    W - s·B₀·A₀ + s·B·A = W + s·[B, -B₀]·[A; A₀]

which is also what PEFT converts to (`path_initial_model_for_weight_conversion`). Everything that reads a run, except
training itself, reads it in this form.

If an objective compares the trained values with their initial values, and those are not just the base, all of them are
saved in the same way, in a separate folder that only training reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.adapted import as_plain, takes_part
from gemma4_tpu.storage import join
from gemma4_tpu.training import checksums
from gemma4_tpu.training.saved import SavedState

FOLDER, REFERENCE_FOLDER = "initial", "reference"
"""Subfolders of `checkpoints/`."""


@dataclass(frozen=True)
class PlainState(SavedState):
    """A checkpoint with its adapters in plain form: A is [A, A₀], B is [B, -B₀], along the rank."""

    began: SavedState

    @property
    def as_trained(self) -> SavedState:
        """The checkpoint as it was saved."""
        return SavedState(self.folder, self.update)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        own = super().shape(name)
        if name not in self.began.names:
            return own
        rank, rest = _rank_dim(name), self.began.shape(name)
        both = own[rank] + rest[rank]
        return tuple(both if i == rank % len(own) else size for i, size in enumerate(own))

    def read(self, name: str, index: Sequence[slice | int] | None = None) -> np.ndarray:
        """As `SavedState.read`."""
        if name not in self.began.names:
            return super().read(name, index)
        own, rest = super().read(name), self.began.read(name)
        both = np.concatenate([own, -rest if _is_b(name) else rest], axis=_rank_dim(name))
        return both if index is None else both[tuple(index)]


def _is_b(name: str) -> bool:
    return name.endswith("_lora_b")


def _rank_dim(name: str) -> int:
    return 0 if _is_b(name) else -1


def open_began(checkpoints: str) -> SavedState:
    """A₀ and B₀ of a run, verified.

    Args:
      checkpoints: its folder of checkpoints, local or gs://.

    Raises:
      UserError: they are missing, or differ from what was saved.
    """
    return _open(join(checkpoints, FOLDER), "the initial adapters (lora.init)", "nothing can be made of")


def open_reference(checkpoints: str) -> SavedState:
    """The run's initial values that an objective compares with, verified; arguments and errors as for `open_began`."""
    return _open(join(checkpoints, REFERENCE_FOLDER), "the run's reference", "no run can continue from")


def _open(folder: str, what: str, without: str) -> SavedState:
    if problem := checksums.problem(folder):
        raise UserError(
            f"{folder}: {what} can't be read: {problem}; without it {without} the checkpoints: restore a good copy"
        )
    return SavedState(folder, 0)


def open_plain(state: SavedState, lora: LoraConfig) -> tuple[SavedState, LoraConfig]:
    """A checkpoint, and the configuration of its adapters, in the form of plain adapters on the original weights.

    Args:
      state: the checkpoint.
      lora: the configuration that it was trained with.

    Raises:
      UserError: the initial adapters cannot be read.
    """
    if not takes_part(lora):
        return state, lora
    began = open_began(state.folder.rpartition("/")[0])
    return PlainState(state.folder, state.update, began), as_plain(lora)
