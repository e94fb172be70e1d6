"""Reads files in place: local ones through memory maps, gs:// (anything fsspec supports) by byte ranges."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.errors import STORAGE_GONE, UserError, first_line, is_of_client

_FETCH_BYTES = 32 << 20  # size of one remote request
_FETCHES = 8  # concurrent remote requests
_ON_REQUEST_SECONDS = 15.0
"""What remains of a deadline once the process is asked to end, in seconds."""
_LOOK_SECONDS, _AGAIN_SECONDS = 0.2, 1.0
_NOT_GONE = (UserError, FileNotFoundError, PermissionError, KeyboardInterrupt)
"""Errors that neither a retry nor time changes."""


class StorageGone(UserError):
    """A bucket did not answer in time."""

    exit_code = STORAGE_GONE


@dataclass(frozen=True)
class Deadline:
    """How long to wait for a bucket."""

    seconds: float
    key: str | None = None
    """The configuration key that set it."""
    hurry: Callable[[], bool] = lambda: False
    """Whether the process has been asked to end."""

    def wait_for(self, what: str, call: Callable[[], object], *, again: bool = False) -> None:
        """Makes a call to a bucket in its own thread, which may never return.

        Args:
          what: the bucket's address, for the message.
          call: the call to make.
          again: whether to retry as long as there is time.

        Raises:
          StorageGone: the call failed, or did not return in time; others: errors of `call` that waiting does not help.
        """
        failures: list[BaseException] = []
        ended, until = threading.Event(), time.monotonic() + self.seconds

        def work() -> None:
            while True:
                try:
                    call()
                    failures.clear()
                    break
                except BaseException as error:
                    failures[:] = [error]
                    if isinstance(error, _NOT_GONE) or not again or time.monotonic() > until:
                        break
                    time.sleep(_AGAIN_SECONDS)
            ended.set()

        threading.Thread(target=work, name="storage", daemon=True).start()
        while not ended.wait(_LOOK_SECONDS) and time.monotonic() < until:
            if self.hurry():
                until = min(until, time.monotonic() + _ON_REQUEST_SECONDS)
                break
        ended.wait(max(0.0, until - time.monotonic()))
        if ended.is_set() and not failures:
            return
        if failures and isinstance(failures[0], _NOT_GONE):
            raise failures[0]
        if failures:  # for the log, since the cause can be a bug of ours rather than the bucket
            logging.getLogger("gemma4_tpu.uncaught").info("where it happened", exc_info=failures[0])
        reason = f"; last: {first_line(failures[0])[:300]}" if failures else ""
        by = f" ({self.key})" if self.key else ""
        raise StorageGone(f"{what}: no answer for {self.seconds:g} s{by}{reason}")


@contextmanager
def answering(path: str) -> Iterator[None]:
    """Names the address in errors of the packages that talk to other machines.

    Raises:
      StorageGone: an address did not answer, or refused.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path) or not is_of_client(error):
            raise
        login = " and the login (gcloud auth application-default login)" if path.startswith("gs://") else ""
        raise StorageGone(f"{path}: {first_line(error)}; check the address, the network{login}") from error


def is_remote(path: str) -> bool:
    """Whether a path is an address, such as gs://…."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """Joins a folder, local or remote, and a name."""
    return f"{folder.rstrip('/')}/{name}"


def list_folder(folder: str) -> list[str]:
    """Names in a folder, sorted; none if there is no such folder."""
    if not is_remote(folder):
        return sorted(p.name for p in Path(folder).iterdir()) if Path(folder).is_dir() else []
    fs, path = filesystem(folder)
    try:
        return sorted(Path(entry).name for entry in fs.ls(path, detail=False))
    except FileNotFoundError:
        return []


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: there is no such file, or it does not contain a JSON object.
    """
    try:
        file = open_bytes(path)
        value = json.loads(bytes(file.read(0, file.size_bytes)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: contains a JSON {type(value).__name__}, not an object; copy the file again")
    return value


def open_bytes(path: str) -> LocalBytes | RemoteBytes:
    """Opens the bytes of a file. Raises FileNotFoundError."""
    return RemoteBytes(path) if is_remote(path) else LocalBytes(path)


class LocalBytes:
    """Bytes of a local file."""

    def __init__(self, path: str):
        self.path = path
        self.size_bytes = Path(path).stat().st_size

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `[start, stop)` as a view into a map of their pages, which is released with the view."""
        if start == stop:
            return memoryview(b"")
        skip = start % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            pages = mmap.mmap(file.fileno(), stop - start + skip, access=mmap.ACCESS_READ, offset=start - skip)
        return memoryview(pages)[skip:]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Bytes of each range `[start, stop)`."""
        return [self.read(start, stop) for start, stop in ranges]

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes from `start` on. Raises OSError if the file ends earlier."""
        with open(self.path, "rb", buffering=0) as file:
            while buffer:
                count = os.preadv(file.fileno(), [buffer], start)
                if not count:
                    raise OSError(errno.EIO, "the file has become shorter", self.path)
                start, buffer = start + count, buffer[count:]


class RemoteBytes:
    """Bytes of a remote file that fsspec can read."""

    def __init__(self, path: str):
        self._fs, self._path = filesystem(path)
        self.size_bytes = int(self._fs.size(self._path))

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes `[start, stop)`, fetched by several concurrent requests."""
        whole = memoryview(bytearray(stop - start))
        cuts = [*range(start, stop, _FETCH_BYTES), stop]
        pieces = list(itertools.pairwise(cuts))
        for i in range(0, len(pieces), _FETCHES):
            group = pieces[i : i + _FETCHES]
            for (a, b), data in zip(group, self.read_many(group), strict=True):
                whole[a - start : b - start] = data
        return whole

    def read_into(self, start: int, buffer: memoryview) -> None:
        """As `LocalBytes.read_into`."""
        buffer[:] = self.read(start, start + len(buffer))

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Bytes of each range `[start, stop)`."""
        starts, stops = [a for a, _ in ranges], [b for _, b in ranges]
        found = self._fs.cat_ranges([self._path] * len(ranges), starts, stops, on_error="raise")
        return [memoryview(data) for data in found]


def filesystem(path: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a local or remote path.

    Raises:
      UserError: the package for such addresses is not installed, or no package supports them.
    """
    import fsspec

    try:
        # files written by other processes and libraries must show at once
        return fsspec.core.url_to_fs(path, **({"use_listings_cache": False} if is_remote(path) else {}))
    except ImportError as error:
        raise UserError(f"{path}: {error}; gs:// paths need the extra: pip install 'gemma4-tpu[gcp]'") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
