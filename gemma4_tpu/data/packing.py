"""Decides which examples share a row (best-fit packing) and chooses bucket lengths, from lengths alone."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

WINDOW = 16384  # examples packed at a time: rows of 4096 are 99.5% full for lengths with a mean of 900
BUCKET_ALIGNMENT = 128  # TPU lanes: the compiler pads any other length up to a multiple of this
MAX_BUCKETS = 4  # each bucket length is another program to compile


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, window: int = WINDOW) -> list[list[int]]:
    """Best-fit decreasing, window by window: longest example first, each into the fullest bin that has room.

    Args:
      lengths: slots of each example, 1 ≤ length ≤ capacity.
      capacity: slots of a bin (T).
      window: number of examples that can share bins; a row moves within an epoch by at most one window.

    Returns:
      For each bin, the positions in `lengths` that share it, ascending. Bins are ordered by their longest member, whose
      place in a shuffled epoch is independent of the number of examples in the bin.

    Raises:
      ValueError: a length exceeds the capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(wrong):
        position = int(wrong[0])
        raise ValueError(f"length {lengths[position]} at position {position} does not fit into rows of {capacity}")
    packed: list[list[int]] = []
    for start in range(0, len(lengths), window):
        bins: list[list[int]] = []
        rooms: list[tuple[int, int]] = []  # (free slots, bin number), sorted
        # Sort by length only within a window: rows get full, yet the order of an epoch stays random beyond a window.
        for position in start + np.argsort(-lengths[start : start + window], kind="stable"):
            length = int(lengths[position])
            # The first bin with at least `length` free slots is the fullest one that has room.
            fit = bisect.bisect_left(rooms, (length, 0))
            room, number = rooms.pop(fit) if fit < len(rooms) else (capacity, len(bins))
            if number == len(bins):
                bins.append([])
            bins[number].append(int(position))
            bisect.insort(rooms, (room - length, number))
        packed += [sorted(members) for members in sorted(bins)]  # each bin received its longest example first
    return packed


def choose_buckets(lengths: np.ndarray, capacity: int) -> list[int]:
    """At most `MAX_BUCKETS` static lengths, the last of them `capacity`, that minimise padding.

    Exact over candidates that are multiples of `BUCKET_ALIGNMENT` (or the capacity), by dynamic programming over the
    histogram of `lengths`, in slots per example.
    """
    candidates = sorted({*range(BUCKET_ALIGNMENT, capacity, BUCKET_ALIGNMENT), capacity})
    below = np.searchsorted(np.sort(np.asarray(lengths)), candidates, side="right")  # examples that fit in each
    # cost[j]: slots of the padded rows if candidate j is the longest bucket so far; each round adds one bucket
    cost = below * np.array(candidates, np.int64)
    chosen = [[j] for j in range(len(candidates))]
    for _ in range(min(MAX_BUCKETS, len(candidates)) - 1):
        best, paths = cost.copy(), list(chosen)
        for j in range(1, len(candidates)):
            options = cost[:j] + (below[j] - below[:j]) * candidates[j]
            i = int(np.argmin(options))
            if options[i] < best[j]:
                best[j], paths[j] = options[i], [*chosen[i], j]
        cost, chosen = best, paths
    return [candidates[j] for j in chosen[-1]]
