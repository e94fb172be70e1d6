"""One big file, written from start to end by a thread while the caller makes the next bytes.

On local disks it bypasses the page cache if the file system allows that: a checkpoint is too large to be worth caching,
and copying it through the cache takes several times the CPU time of the write itself.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import xxhash

BUFFER_BYTES = 16 << 20  # one write; a multiple of every disk's block
BUFFERS = 3  # one being filled, one being written, one waiting


class Sink(Protocol):
    """The destination of one file's bytes."""

    def write(self, data: memoryview) -> Any:
        """Appends all of `data`."""

    def close(self) -> Any:
        """Returns once the file is stored permanently."""

    def discard(self) -> Any:
        """Abandons the file and leaves nothing behind."""


class Writer:
    """A file being written. As a context manager, it discards the file if an error leaves the block.

    An error in the thread is raised by the next `write`, or by `finish`.
    """

    def __init__(self, sink: Sink):
        self.size_bytes = 0
        self._sink = sink
        self._digest = xxhash.xxh3_128()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._buffers = [np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8) for _ in range(BUFFERS)]
        self._filled_bytes = 0  # in the first buffer
        self._under_way: deque[Future[None]] = deque()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, failure: Any, *_: Any) -> None:
        self._thread.shutdown(wait=True, cancel_futures=failure is not None)
        if failure is not None:
            self._sink.discard()

    def write(self, data: Any) -> None:
        """Appends the bytes of anything that has a buffer, which may be changed once this returns."""
        left = np.frombuffer(data, np.uint8)
        self.size_bytes += len(left)
        while len(left):
            room = self._buffers[0][self._filled_bytes :]
            count = min(len(room), len(left))
            room[:count] = left[:count]
            left = left[count:]
            self._filled_bytes += count
            if self._filled_bytes == BUFFER_BYTES:
                self._hand_over()

    def finish(self) -> str:
        """Waits until every byte is stored; returns the checksum."""
        self._hand_over()
        while self._under_way:
            self._under_way.popleft().result()
        self._sink.close()
        return self._digest.hexdigest()

    def _hand_over(self) -> None:
        """Hands the first buffer to the thread, and waits until the next one is free."""
        self._under_way.append(self._thread.submit(self._store, self._buffers[0][: self._filled_bytes]))
        self._buffers.append(self._buffers.pop(0))
        self._filled_bytes = 0
        if len(self._under_way) == BUFFERS:
            self._under_way.popleft().result()

    def _store(self, data: np.ndarray) -> None:
        self._digest.update(data.data)
        self._sink.write(data.data)


class DiskFile:
    """A new local file that bypasses the page cache where that works."""

    def __init__(self, path: str):
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._closed = False
        try:
            self._handle, self._direct = os.open(path, flags | os.O_DIRECT, 0o666), True
        except (AttributeError, OSError):  # not Linux, or a file system in memory
            self._handle, self._direct = os.open(path, flags, 0o666), False

    def write(self, data: memoryview) -> None:
        """Raises OSError, such as a full disk."""
        while data:
            try:
                data = data[os.write(self._handle, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = False  # the end of a file, shorter than a block
                flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)

    def close(self) -> None:
        """Closes the file once its bytes are on the disk."""
        os.fsync(self._handle)
        self._release()

    def discard(self) -> None:
        """Removes the file; may follow `close`, since the disk can be full when the journal is written."""
        self._release()
        with suppress(FileNotFoundError):
            os.remove(self._path)

    def _release(self) -> None:
        if not self._closed:
            os.close(self._handle)
            self._closed = True


def checksum(path: str) -> str:
    """The checksum of a local file, as `Writer.finish` returned it."""
    digest, buffer = xxhash.xxh3_128(), np.empty(BUFFER_BYTES, np.uint8)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer.data):
            digest.update(buffer.data[:count])
    return digest.hexdigest()
