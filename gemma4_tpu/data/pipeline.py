"""Turns a plan into arrays: the batches of a run, prefetched by Grain, with a position that can be saved and
restored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from gemma4_tpu.config.refusals import resume_allow
from gemma4_tpu.config.schema import DataConfig
from gemma4_tpu.data.drops import Origin
from gemma4_tpu.data.examples import Examples
from gemma4_tpu.data.picture_cache import Shown
from gemma4_tpu.data.updates import PlannedUpdate, Updates
from gemma4_tpu.errors import UserError

STATE_VERSION = 1
FEATURES = "features"
"""Name of the batch array with the pictures' features."""
READ_AHEAD_UPDATES = 4


@dataclass(frozen=True)
class Update:
    """The data of one update. Counts are global (over all processes); arrays hold this process's rows."""

    arrays: dict[str, np.ndarray]
    """`tokens`, `targets`, `segment_ids`, `positions` int32 and `target_mask` bool, each [M, B, T]; with pictures, also
    `features` [M, B, T, I].
    """
    real_tokens: int
    """Slots that are not padding."""
    target_tokens: int
    """Slots with loss."""
    fill: float
    """`real_tokens` over all slots."""
    epoch: float
    """Passes over the data after this update."""
    rows: list[list[list[int]]]
    """[M][B over all processes]: the examples in each row."""
    examples: Examples
    figures: Mapping[str, float] = field(default_factory=dict)
    """Measurements of how the update was made."""

    def origins(self, microbatch: int | None = None) -> list[list[Origin]]:
        """Where the examples of each row came from, for one microbatch or for all; used in messages."""
        groups = self.rows if microbatch is None else [self.rows[microbatch]]
        return [[self.examples.origin(index) for index in row] for group in groups for row in group]


class Source(Protocol):
    """Where the loop gets its updates from: given rows, or answers of the policy being trained."""

    fingerprint: dict[str, Any]
    """Everything that determines the content of the updates; a saved position is valid only for the same
    fingerprint.
    """

    @property
    def total_updates(self) -> int:
        """Updates in the whole run."""

    @property
    def total_epochs(self) -> float:
        """Passes over the data in the whole run."""

    @property
    def lengths(self) -> list[int]:
        """Static row lengths T that updates can have."""

    def updates(self, trained: Callable[[], Any]) -> Iterator[Update]:
        """Yields updates from the current position on. `trained()` returns the values after the previous update, as
        they are when the next update is requested.
        """

    def landed(self, update: int, loss: float) -> None:
        """Called with the loss of `update`. Raises: UserError: it does not match the batch."""

    def ready_to_save(self, trained: Any, update: int) -> None:
        """Called with the values after `update`, before they are saved. Raises: UserError: they must not be saved."""

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-serialisable."""

    def set_state(self, state: dict[str, Any], allow: Collection[str] = ()) -> None:
        """Continues where `get_state` was called. Raises: UserError: data or settings differ."""

    def close(self) -> None:
        """Releases resources."""


class Assembler:
    """Turns a planned update into arrays [M, B, T] of the rows that this process owns."""

    def __init__(
        self, examples: Examples, rows_per_update: int, microbatches: int, row_slice: tuple[int, int] | None,
        shown: Shown | None = None,
    ):  # fmt: skip
        """Prepares the arrays of a plan.

        Args:
          examples: tokenised examples.
          rows_per_update: rows over all processes and microbatches.
          microbatches: M.
          row_slice: (start, stop) of the rows of each microbatch that this process owns; None: all.
          shown: features of the examples' pictures; None: there are none.
        """
        if rows_per_update % microbatches:
            raise UserError(
                f"{rows_per_update} rows per update do not divide into trainer.microbatches={microbatches} equal parts"
            )
        self._examples, self._shown = examples, shown
        self._targets = examples.targets
        self._slots = examples.slots
        self._microbatches = microbatches
        self._rows = rows_per_update // microbatches
        self._start, self._stop = row_slice or (0, self._rows)
        if not 0 <= self._start < self._stop <= self._rows:
            raise UserError(f"row_slice {row_slice} lies outside the {self._rows} rows of a microbatch")

    def __call__(self, planned: PlannedUpdate) -> Update:
        """The arrays of an update, padded with empty rows to its full size."""
        # The last update of a run can have fewer rows; its shape stays the same, or the step would be recompiled for
        # it.
        padded = planned.rows + [[]] * (self._microbatches * self._rows - len(planned.rows))
        rows = [padded[m * self._rows : (m + 1) * self._rows] for m in range(self._microbatches)]
        shape = (self._microbatches, self._stop - self._start, planned.length)
        arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        arrays["target_mask"] = np.zeros(shape, bool)
        arrays |= {
            name: np.zeros((*shape, *values.shape[1:]), values.dtype) for name, values in self._examples.beside.items()
        }
        if self._shown is not None:
            arrays[FEATURES] = self._shown.empty(shape)
        for m, group in enumerate(rows):
            for b, row in enumerate(group[self._start : self._stop]):
                self._write({name: array[m, b] for name, array in arrays.items()}, row)
        members = [index for row in planned.rows for index in row]
        real_tokens = int(self._slots[members].sum())
        return Update(
            arrays=arrays,
            real_tokens=real_tokens,
            target_tokens=int(self._targets[members].sum()),
            fill=real_tokens / (len(padded) * planned.length),
            epoch=planned.epoch,
            rows=rows,
            examples=self._examples,
        )

    def _write(self, views: dict[str, np.ndarray], row: list[int]) -> None:
        """Writes the examples of one row consecutively into views [T]; each sequence is a segment."""
        start = 0
        sequences = (
            (self._examples.offsets[index], sequence) for index in row for sequence in self._examples.sequences(index)
        )
        for segment, (first, (ids, flags)) in enumerate(sequences, start=1):
            part = slice(start, start + len(ids) - 1)
            views["tokens"][part] = ids[:-1]
            views["targets"][part] = ids[1:]
            views["target_mask"][part] = flags[1:]
            views["segment_ids"][part] = segment
            views["positions"][part] = np.arange(len(ids) - 1)
            for name, values in self._examples.beside.items():
                views[name][part] = values[first + 1 : first + len(ids)]
            start = part.stop
        if self._shown is not None and self._examples.pictures is not None:  # no answer ends in a picture
            keys = [key for index in row for key in self._examples.pictures[index]]
            self._shown.lay(views["tokens"], keys, views[FEATURES])


class Pipeline:
    """Iterator over the updates of a run.

    Args:
      examples: tokenised training examples, the same in every process.
      data: packing, lengths and shuffling.
      rows_per_update: rows of one update over all processes and microbatches.
      microbatches: M; row r of an update is row r % (rows / M) of microbatch r // (rows / M).
      seed: orders the examples of each epoch, together with the epoch's number.
      row_slice: (start, stop) of the rows of each microbatch that this process owns; None: all.
      epochs: length of the run in passes over the data; a fraction of a pass ends with the update that reaches it.
      max_updates: length of the run in updates; with both, the shorter one holds.
      shown: features of the examples' pictures; None: none are read.

    Raises:
      UserError: no limit is given, rows do not divide into microbatches, or there is nothing to visit.
    """

    def __init__(
        self,
        *,
        examples: Examples,
        data: DataConfig,
        rows_per_update: int,
        seed: int,
        microbatches: int = 1,
        row_slice: tuple[int, int] | None = None,
        epochs: float | None = None,
        max_updates: int | None = None,
        shown: Shown | None = None,
    ):
        self._plan = Updates(
            examples, data, rows_per_update=rows_per_update, seed=seed, epochs=epochs, max_updates=max_updates
        )
        self._assemble = Assembler(examples, rows_per_update, microbatches, row_slice, shown)
        self.fingerprint: dict[str, Any] = {
            **examples.fingerprint,
            "sequence_length": data.sequence_length,
            "packing": self._plan.packing,
            "buckets": self._plan.buckets,
            "shuffle": data.shuffle,
            "seed": seed,
            "rows_per_update": rows_per_update,
        }
        """Everything that determines the content of the updates; a saved position is valid only for the same
        fingerprint.
        """
        self._iterator: Any = None

    @property
    def total_updates(self) -> int:
        """Updates in the whole run."""
        return len(self._plan)

    @property
    def total_epochs(self) -> float:
        """Passes over the data in the whole run."""
        return self._plan[len(self._plan) - 1].epoch

    @property
    def lengths(self) -> list[int]:
        """Static row lengths T that updates can have; the step is compiled once for each."""
        return list(self._plan.buckets)

    def updates(self, trained: Callable[[], Any]) -> Iterator[Update]:
        """See `Source`; the trained values make no difference here."""
        return self

    def landed(self, update: int, loss: float) -> None:
        """See `Source`."""

    def ready_to_save(self, trained: Any, update: int) -> None:
        """See `Source`."""

    def __iter__(self) -> Iterator[Update]:
        return self

    def __next__(self) -> Update:
        return next(self._reader())

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-serialisable, independent of process count, mesh and number of microbatches."""
        return {"version": STATE_VERSION, "iterator": self._reader().get_state(), "fingerprint": self.fingerprint}

    def set_state(self, state: dict[str, Any], allow: Collection[str] = ()) -> None:
        """Continues where `get_state` was called, in this process or another.

        Args:
          state: the return value of `get_state`.
          allow: keys of the fingerprint that may differ (`checkpoint.resume_allow`).

        Raises:
          UserError: the state belongs to other data, another tokenizer, packing, seed or batch size.
        """
        check_position(state, self.fingerprint, allow)
        self._reader().set_state(state["iterator"])

    def close(self) -> None:
        """Stops prefetching."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _reader(self) -> Any:
        """Grain's iterator over the plan, created on first use because Grain imports JAX."""
        if self._iterator is None:
            import grain

            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD_UPDATES)
            dataset = grain.MapDataset.source(self._plan).map(self._assemble)
            self._iterator = iter(dataset.to_iter_dataset(options))
        return self._iterator


def check_position(state: dict[str, Any], fingerprint: dict[str, Any], allow: Collection[str]) -> None:
    """Checks that a saved position belongs to a source with this fingerprint.

    Raises:
      UserError: it does not, and `allow` does not name the differences.
    """
    saved = {"version": state.get("version"), **state.get("fingerprint", {})}
    own = {"version": STATE_VERSION, **fingerprint}
    changed = [key for key in {**saved, **own} if saved.get(key) != own.get(key) and key not in allow]
    if changed:
        lines = "".join(f"\n  {key}: saved {saved.get(key)!r}, now {own.get(key)!r}" for key in changed)
        raise UserError(
            f"the saved position belongs to another data pipeline:{lines}\n"
            "Resume with the settings and files that the run started with, start a new run folder, or accept these "
            f"differences: {resume_allow(allow, changed)}"
        )


def heldout_batches(
    examples: Examples,
    data: DataConfig,
    *,
    rows_per_update: int,
    microbatches: int = 1,
    row_slice: tuple[int, int] | None = None,
    shown: Shown | None = None,
) -> Iterator[Update]:
    """One pass over the held-out examples in a fixed order, packed as in training; empty rows fill the last batch."""
    fixed = replace(data, shuffle=False)
    plan = Updates(examples, fixed, rows_per_update=rows_per_update, seed=0, epochs=1)
    assemble = Assembler(examples, rows_per_update, microbatches, row_slice, shown=shown)
    return (assemble(plan[update]) for update in range(len(plan)))
