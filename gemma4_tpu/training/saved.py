"""Saved checkpoints as files: which exist, which is the best, and their tensors, whole or in slices.

Reads what `checkpoint.py` wrote (Orbax's OCDBT layout) through TensorStore alone: no JAX, no devices, and no more of a
checkpoint in memory than requested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import is_remote, join, list_folder, read_json
from gemma4_tpu.training import checksums

TRAINED = "trained"


@dataclass(frozen=True)
class SavedState:
    """The trained values of one checkpoint."""

    folder: str
    """`checkpoints/<update>`, local or gs://."""
    update: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the trained tensors, sorted."""
        keys = [[str(part["key"]) for part in e["key_metadata"]] for e in self._metadata["tree_metadata"].values()]
        return tuple(sorted(key[1] for key in keys if key[0] == TRAINED))

    @cached_property
    def identity(self) -> str:
        """Distinguishes this save from any other, including one at the same update of the same run."""
        return hashlib.sha256(checksums.recorded(self.folder)).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a saved array."""
        return tuple(self._open(name).shape)

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """The smallest unit that is read from disk."""
        return tuple(self._open(name).chunk_layout.read_chunk.shape)

    def read(self, name: str, index: Sequence[slice | int] | None = None) -> np.ndarray:
        """A tensor or a slice of it, in its in-memory layout.

        Raises:
          UserError: the files are damaged.
        """
        store = self._open(name)
        try:
            return np.asarray((store if index is None else store[tuple(index)]).read().result())
        except (ValueError, OSError) as error:
            raise self._damaged(name, error) from None

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        try:
            return read_json(join(self.folder, "state/_METADATA"))
        except (OSError, ValueError) as error:
            raise self._damaged("_METADATA", error) from None

    def _open(self, name: str) -> Any:
        return _open_store(self, name)

    def _spec(self, name: str) -> dict[str, Any]:
        store = {"driver": "ocdbt", "base": _uri(join(self.folder, "state/")), "path": f"{TRAINED}.{name}/"}
        return {"driver": "zarr3" if self._metadata.get("use_zarr3") else "zarr", "kvstore": store}

    def _damaged(self, name: str, error: Exception | str) -> UserError:
        reason = str(error).splitlines()[0][:200]
        return UserError(f"{self.folder}: a damaged checkpoint ({name}: {reason}); use another, checkpoint=<update>")


def _uri(folder: str) -> str:
    return folder if is_remote(folder) else f"{Path(folder).absolute().as_uri()}/"


@cache
def _open_store(state: SavedState, name: str) -> Any:
    if name not in state.names:
        raise KeyError(name)
    try:
        return ts.open(state._spec(name), open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise state._damaged(name, error) from None


def saved_updates(checkpoints: str | Path) -> list[int]:
    """Updates that have a checkpoint, finished or not, oldest first."""
    names = list_folder(str(checkpoints))
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def open_saved(run: str | Path, which: str, *, key: str = "run", which_key: str = "checkpoint") -> SavedState:
    """The checkpoint of a run folder that `which` means: `latest`, `best` or the number of an update; verified.

    Args:
      run: the run folder, local or gs://.
      which: one of its checkpoints.
      key: the configuration key that names the run, for messages.
      which_key: the one that selects the checkpoint.

    Raises:
      UserError: it does not exist (lists those that do), or its bytes differ from what was saved.
    """
    checkpoints = join(str(run), "checkpoints")
    there = [u for u in saved_updates(checkpoints) if checksums.is_finished(join(checkpoints, str(u)))]
    if not there:
        raise UserError(f"{key}={run}: has no checkpoint; resume it with run_dir={run}")
    listed = ", ".join(map(str, there))
    if which == "latest":
        update = there[-1]
    elif which == "best":
        best = _best_update(join(checkpoints, str(there[-1])))
        if best is None:
            raise UserError(
                f"{which_key}=best: {run} has no held-out loss to choose by; give latest or one of {listed}"
            )
        if best not in there:
            raise UserError(
                f"{which_key}=best: the best was at update {best}, whose checkpoint is gone; there are {listed}"
            )
        update = best
    else:
        update = int(which)
        if update not in there:
            raise UserError(f"{which_key}={which}: {run} has no such checkpoint; there are {listed}, best and latest")
    state = SavedState(join(checkpoints, str(update)), update)
    if problem := checksums.problem(state.folder):
        raise state._damaged("checksums", problem)
    return state


def _best_update(latest: str) -> int | None:
    """The update with the lowest held-out loss so far, as recorded by the latest checkpoint."""
    try:
        position = read_json(join(latest, "position/metadata"))
    except (OSError, ValueError):
        return None
    return position.get("totals", {}).get("heldout_update_best")
