"""Which examples share a row: first-fit packing and the choice of bucket lengths, on lengths alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OPEN_BINS = 32  # 32 open bins fill rows of 4096 to 96% at lengths with a mean of 900; more gain little
BUCKET_ALIGNMENT = 128  # TPU lanes: a length that is no multiple of this is padded up by the compiler anyway
MAX_BUCKETS = 4  # every bucket length is one more program to compile


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, open_bins: int = OPEN_BINS) -> list[list[int]]:
    """First-fit: put each length, in order, into the first open bin with room; a full house closes the fullest bin.

    Args:
      lengths: slots of each example, 1 ≤ length ≤ capacity.
      capacity: slots of a bin (T).
      open_bins: how many bins may wait for more at one time.

    Returns:
      For each bin, in the order of opening, the positions in `lengths` that share it.

    Raises:
      ValueError: a length does not fit into a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []  # of the open bins, in the order of opening
    opened: list[int] = []  # their numbers in `bins`
    for position, length in enumerate(np.asarray(lengths).tolist()):
        if not 1 <= length <= capacity:
            raise ValueError(f"length {length} at position {position} does not fit into rows of {capacity}")
        for slot, free in enumerate(room):
            if free >= length:
                room[slot] = free - length
                bins[opened[slot]].append(position)
                break
        else:
            if len(room) == open_bins:
                fullest = min(range(open_bins), key=room.__getitem__)
                del room[fullest], opened[fullest]
            room.append(capacity - length)
            opened.append(len(bins))
            bins.append([position])
    return bins


def choose_buckets(lengths: np.ndarray, capacity: int, count: int = MAX_BUCKETS) -> list[int]:
    """At most `count` static lengths, the last of them `capacity`, that waste the fewest padding slots.

    Exact for candidates that are multiples of `BUCKET_ALIGNMENT` (or the capacity itself), by dynamic programming
    over the histogram of `lengths`, which are slots per example.
    """
    candidates = sorted({*range(BUCKET_ALIGNMENT, capacity, BUCKET_ALIGNMENT), capacity})
    below = np.searchsorted(np.sort(np.asarray(lengths)), candidates, side="right")  # examples that fit in each
    # cost[j]: slots of padded rows when candidate j is the longest bucket so far; one round adds one bucket
    cost = below * np.array(candidates, np.int64)
    chosen = [[j] for j in range(len(candidates))]
    for _ in range(min(count, len(candidates)) - 1):
        best, paths = cost.copy(), list(chosen)
        for j in range(1, len(candidates)):
            options = cost[:j] + (below[j] - below[:j]) * candidates[j]
            i = int(np.argmin(options))
            if options[i] < best[j]:
                best[j], paths[j] = options[i], [*chosen[i], j]
        cost, chosen = best, paths
    return [candidates[j] for j in chosen[-1]]
