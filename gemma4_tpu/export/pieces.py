"""Makes a big file piece by piece: several threads make pieces, one writes them in order, memory stays bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gemma4_tpu.export.companions import COPY_BYTES
from gemma4_tpu.models.tensorfile import TensorFile

MEMORY_BYTES = 512 << 20  # of all pieces in progress
WORKERS = min(8, 2 * (os.cpu_count() or 1))  # twice the cores, because some wait for the disk


class Piece(NamedTuple):
    """Consecutive bytes of a shard."""

    name: str | None
    """The weight to which they belong; None: they are copied."""
    memory_bytes: int
    """Memory needed to make them."""
    make: Callable[[], tuple[np.ndarray, Any]]
    """Returns the bytes, and further results about them."""


def in_order(workers: ThreadPoolExecutor, pieces: Iterator[Piece]) -> Iterator[tuple[str | None, Any]]:
    """Name and result of each piece, in order; limits the pieces in progress so that memory stays bounded."""
    under_way: deque[tuple[Piece, Future[Any]]] = deque()
    for piece in pieces:
        while under_way and piece.memory_bytes + sum(other.memory_bytes for other, _ in under_way) > MEMORY_BYTES:
            first, result = under_way.popleft()
            yield first.name, result.result()
        under_way.append((piece, workers.submit(piece.make)))
    while under_way:
        first, result = under_way.popleft()
        yield first.name, result.result()


def copies(file: TensorFile, start: int, stop: int) -> Iterator[Piece]:
    """Bytes `[start, stop)` of a file, unchanged."""

    def copy(at: int) -> tuple[np.ndarray, None]:
        return file.read_bytes(at, min(at + COPY_BYTES, stop)), None

    return (Piece(None, COPY_BYTES, partial(copy, at)) for at in range(start, stop, COPY_BYTES))


def rows_of(file: TensorFile, name: str, rows: slice) -> np.ndarray:
    """Rows of a tensor, in this process's memory."""
    info = file.tensors[name]
    row_bytes = (info.stop - info.start) // info.shape[0]
    data = file.read_bytes(info.start + rows.start * row_bytes, info.start + rows.stop * row_bytes)
    return data.view(info.dtype).reshape(-1, *info.shape[1:])


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Contiguous values as they are stored."""
    return values.reshape(-1).view(np.uint8)
