"""Assigns examples to updates. Every process computes the same plan and reads only its own rows of it."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np

from gemma4_tpu.config.schema import DataConfig
from gemma4_tpu.data.examples import Examples
from gemma4_tpu.data.packing import choose_buckets, pack
from gemma4_tpu.errors import UserError

PackedRow = list[int]  # indices of the examples that share one row
EPOCHS_KEPT = 2  # planned epochs kept in memory; earlier ones are planned again on request


@dataclass(frozen=True)
class PlannedUpdate:
    """The rows of one update, over all processes; only the last update of a run can have fewer than
    `rows_per_update`.
    """

    length: int
    """Static length T of its rows, in slots."""
    rows: list[PackedRow]
    epoch: float
    """Passes over the data after this update."""


@dataclass(frozen=True)
class _Epoch:
    updates: list[PlannedUpdate]
    rest: list[PackedRow]
    """Rows that did not fill an update; they lead the next epoch."""


class Updates:
    """Random access to the updates of a run: `plan[u]` depends only on the examples, the data configuration and the
    seed.

    Epochs are continuous: rows that do not fill an update lead the next epoch, and only the last update of the run can
    be partial. A fractional epoch ends with the update that reaches it, so that a longer run begins with exactly the
    updates of a shorter one.

    Raises:
      UserError: no limit is given, an example is longer than a row, or the sources' weights leave nothing to visit.
    """

    def __init__(
        self,
        examples: Examples,
        data: DataConfig,
        *,
        rows_per_update: int,
        seed: int,
        epochs: float | None = None,
        max_updates: int | None = None,
    ):
        if epochs is None and max_updates is None:
            raise UserError("neither trainer.epochs nor trainer.max_updates is set: set one of them")
        self._examples = examples
        self._slots = examples.slots
        self._data = data
        self._rows_per_update = rows_per_update
        self._seed = seed % 2**64
        self.packing = data.packing
        self.buckets = self._bucket_lengths() if self.packing == "buckets" else [data.sequence_length]
        if len(examples) and int(self._slots.max()) > self.buckets[-1]:
            raise UserError(f"an example takes {self._slots.max()} slots, but rows have {self.buckets[-1]}")
        self._lock = threading.RLock()  # Grain reads from several threads
        self._starts = [0]  # first update of each epoch reached so far
        self._rests: list[list[PackedRow]] = [[]]  # rows that lead each epoch
        self._kept: dict[int, _Epoch] = {}
        self._last: PlannedUpdate | None = None  # the partial update at the end of a run of `epochs`
        limits = [] if epochs is None else [self._count_updates(epochs)]
        self._length = min([*limits, max_updates] if max_updates is not None else limits)
        if limits and self._length < limits[0]:
            self._last = None

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:  # Grain prints it in its messages
        return f"Updates({len(self)} updates of {self._rows_per_update} rows, packing={self.packing})"

    def __getitem__(self, update: int) -> PlannedUpdate:
        if not 0 <= update < self._length:
            raise IndexError(f"update {update} of {self._length}")
        if self._last is not None and update == self._length - 1:
            return self._last
        with self._lock:
            while self._starts[-1] <= update:
                self._epoch(len(self._starts) - 1)
            epoch = int(np.searchsorted(self._starts, update, side="right")) - 1
            return self._epoch(epoch).updates[update - self._starts[epoch]]

    def _count_updates(self, epochs: float) -> int:
        """Number of updates in `epochs` passes, planning each of them; sets `_last` if the run ends in a partial
        update.
        """
        whole = math.floor(epochs)
        for epoch in range(whole):
            self._epoch(epoch)
        updates, rest = self._starts[whole], self._rests[whole]
        if epochs > whole:
            planned = self._epoch(whole)
            reached = sum(update.epoch < epochs for update in planned.updates) + 1
            updates += min(reached, len(planned.updates))
            rest = planned.rest if reached > len(planned.updates) else []
        if rest:
            self._last = PlannedUpdate(self._shortest_length(rest), rest, float(math.ceil(epochs)))
            updates += 1
        return updates

    def _epoch(self, epoch: int) -> _Epoch:
        """Plans `epoch`, whose predecessors have all been planned once, or returns it from those kept."""
        if epoch in self._kept:
            return self._kept[epoch]
        # Seeded by the epoch's own number, so that an evicted epoch is planned again with the same draws.
        rng = np.random.default_rng([self._seed, epoch])
        order = self._order(rng)
        lead = self._rests[epoch]
        filled, rest = self._fill(order, lead, rng)
        # Rows that lead this epoch were visited, and counted, as part of the previous one.
        visited = np.cumsum([sum(map(len, rows)) for _, rows in filled]) - sum(map(len, lead))
        planned = _Epoch(
            updates=[
                PlannedUpdate(length, rows, epoch + int(done) / len(order))
                for (length, rows), done in zip(filled, visited, strict=True)
            ],
            rest=rest,
        )
        # Only the first time; an epoch that is planned again keeps its start.
        if epoch + 1 == len(self._starts):
            self._starts.append(self._starts[epoch] + len(planned.updates))
            self._rests.append(planned.rest)
        self._kept[epoch] = planned
        while len(self._kept) > EPOCHS_KEPT:
            del self._kept[next(iter(self._kept))]
        return planned

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """int64: the examples that an epoch visits, in order."""
        visits = []
        for source, weight in enumerate(self._examples.weights):
            members = np.flatnonzero(self._examples.source == source)
            whole = math.floor(weight)
            drawn = rng.choice(members, round((weight - whole) * len(members)), replace=False)
            visits += [members] * whole + [np.sort(drawn)]
        order = np.concatenate(visits)
        if not len(order):
            raise UserError(
                f"no example to visit: {len(self._examples)} examples with source weights {self._examples.weights}"
            )
        return rng.permutation(order) if self._data.shuffle else order

    def _fill(
        self, order: np.ndarray, lead: list[PackedRow], rng: np.random.Generator
    ) -> tuple[list[tuple[int, list[PackedRow]]], list[PackedRow]]:
        """((T, rows) of each full update, leftover rows) of one epoch that begins with the rows `lead`."""
        if self.packing == "buckets":
            return self._fill_buckets(order, lead, rng)
        if self.packing == "true":
            rows = [order[bin_].tolist() for bin_ in pack(self._slots[order], self._data.sequence_length)]
        else:
            rows = [[index] for index in order.tolist()]
        full, rest = self._split(lead + rows)
        return [(self._data.sequence_length, rows) for rows in full], rest

    def _fill_buckets(
        self, order: np.ndarray, lead: list[PackedRow], rng: np.random.Generator
    ) -> tuple[list[tuple[int, list[PackedRow]]], list[PackedRow]]:
        """Like `_fill`; rows that do not fill an update of their bucket are promoted to the next longer one."""
        visits = np.concatenate([np.array([row[0] for row in lead], np.int64), order])
        bucket = np.searchsorted(self.buckets, self._slots[visits])
        filled: list[tuple[int, list[PackedRow]]] = []
        rest: list[PackedRow] = []
        for number, length in enumerate(self.buckets):
            full, rest = self._split(rest + [[index] for index in visits[bucket == number].tolist()])
            filled += [(length, rows) for rows in full]
        if self._data.shuffle:
            filled = [filled[i] for i in rng.permutation(len(filled))]
        return filled, rest

    def _split(self, rows: list[PackedRow]) -> tuple[list[list[PackedRow]], list[PackedRow]]:
        """(full updates, leftover rows)."""
        size = self._rows_per_update
        end = len(rows) - len(rows) % size
        return [rows[i : i + size] for i in range(0, end, size)], rows[end:]

    def _shortest_length(self, rows: list[PackedRow]) -> int:
        longest = max(int(self._slots[row].sum()) for row in rows)
        return next(length for length in self.buckets if length >= longest)

    def _bucket_lengths(self) -> list[int]:
        capacity = self._data.sequence_length
        if self._data.buckets is None:
            return choose_buckets(self._slots, capacity)
        if not all(0 < length <= capacity for length in self._data.buckets):
            raise UserError(
                f"data.buckets={self._data.buckets}: lengths must be between 1 and data.sequence_length={capacity}"
            )
        return sorted({*self._data.buckets, capacity})
