"""Where an export is written: a staging folder beside the target that becomes the target in one rename.

The staging folder is `.<name>.partial`. Finished files are listed in its journal, so that a killed export goes on with
the file it was at. On gs:// a rename is a copy of each object; there `config.json`, without which nothing loads, comes
last.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import filesystem, is_remote, join, list_folder, open_bytes, read_json
from gemma4_tpu.tracking.files import write_text

log = logging.getLogger(__name__)

JOURNAL, LOCK = ".journal.json", ".lock"
LAST = "config.json"
COPY_BYTES = 32 << 20


class Place:
    """A target folder, local or remote, and the staging folder beside it."""

    def __init__(self, target: str):
        self.target = target.rstrip("/") if is_remote(target) else str(Path(target).absolute())
        parent, _, name = self.target.rpartition("/")
        self.parent, self.staging = parent, join(parent, f".{name}.partial")
        self._old = join(parent, f".{name}.replaced")
        self.remote = is_remote(target)
        self.journal: dict[str, Any] = {}
        self._lock: int | None = None
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish-files")
        self._finishing: deque[Future[None]] = deque()

    def check(self, overwrite: bool) -> None:
        """Raises `UserError` if the target exists and may not be replaced."""
        self._put_back()
        if not overwrite and self._exists():
            raise UserError(f"target={self.target}: exists; give overwrite=true to replace it, or another target")

    def _exists(self) -> bool:
        if self.remote:  # without config.json it is an upload that was interrupted
            return LAST in (names := list_folder(self.target)) or "adapter_config.json" in names
        return os.path.lexists(self.target)

    def open(self, identity: dict[str, Any], needed_bytes: int) -> None:
        """Makes the staging folder, or goes on with what an interrupted export of the same identity left.

        Raises:
          UserError: another process is writing there, or there is not enough space.
        """
        if not self.remote:
            try:
                os.makedirs(self.staging, exist_ok=True)
            except OSError as error:
                raise UserError(f"target={self.target}: can't write there ({error.strerror})") from None
            self._take_lock()
        names = list_folder(self.staging)
        found = read_json(join(self.staging, JOURNAL)) if JOURNAL in names else {}
        if found.get("identity") == identity:
            self.journal = found
            log.info("going on with an interrupted export: %d files are done", len(found["files"]))
        else:
            if leftover := [name for name in names if name not in (LOCK, JOURNAL)]:
                log.info("%s: %d files of another export are removed", self.staging, len(leftover))
            self.journal = {"identity": identity, "files": {}}
        for name in set(names) - {LOCK} - ({JOURNAL, *found["files"]} if self.journal is found else set()):
            self._remove(name)
        self._check_space(needed_bytes - sum(entry["bytes"] for entry in self.journal["files"].values()))

    def _check_space(self, needed_bytes: int) -> None:
        if self.remote:
            return
        free = shutil.disk_usage(self.parent).free
        if needed_bytes > free:
            self.close()
            if not self.journal["files"]:
                shutil.rmtree(self.staging)
            raise UserError(
                f"target={self.target}: {needed_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free there;"
                " make space, or give a target on another disk"
            )

    def done(self, name: str) -> dict[str, Any] | None:
        """What was noted with a finished file; None: it is still to be written."""
        entry = self.journal["files"].get(name)
        if entry is None:
            return None
        try:
            return entry if open_bytes(join(self.staging, name)).size_bytes == entry["bytes"] else None
        except FileNotFoundError:
            return None

    def create(self, name: str) -> BinaryIO:
        """A file to write from start to end; `finish` it."""
        if self.remote:
            fs, path = filesystem(join(self.staging, name))
            return fs.open(path, "wb")
        return open(f"{join(self.staging, name)}.part", "wb")

    def finish(self, name: str, file: BinaryIO, **notes: Any) -> None:
        """Makes a file whole: on disk, under its name, in the journal. While the disk writes, the caller goes on."""
        self._finishing.append(self._finisher.submit(self._finish, name, file, notes))
        if len(self._finishing) > 2:
            self._finishing.popleft().result()

    def wait(self) -> None:
        """Waits until every finished file is on disk; raises what went wrong there."""
        while self._finishing:
            self._finishing.popleft().result()

    def _finish(self, name: str, file: BinaryIO, notes: dict[str, Any]) -> None:
        size_bytes = file.tell()
        if self.remote:
            file.close()
        else:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(file.name, join(self.staging, name))
        self.journal["files"][name] = {"bytes": size_bytes, **notes}
        self.write(JOURNAL, json.dumps(self.journal))

    def write(self, name: str, text: str) -> None:
        """A small file, at once."""
        if self.remote:
            fs, path = filesystem(join(self.staging, name))
            fs.pipe_file(path, text.encode())
        else:
            write_text(Path(self.staging) / name, text)

    def publish(self) -> str:
        """Renames the staging folder to the target (replacing an old one), and returns the target."""
        self.wait()
        if self.remote:
            self._publish_remote()
        else:
            for name in (JOURNAL, LOCK):
                with suppress(FileNotFoundError):
                    os.remove(join(self.staging, name))
            if os.path.lexists(self.target):
                os.rename(self.target, self._old)
            os.rename(self.staging, self.target)
            _sync_folder(self.parent)
            shutil.rmtree(self._old, ignore_errors=True)
        self.close()
        return self.target

    def discard(self) -> None:
        """Removes what was staged."""
        self.wait()
        if self.remote:
            for name in list_folder(self.staging):
                self._remove(name)
        else:
            shutil.rmtree(self.staging, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Gives up the right to write here."""
        self._finisher.shutdown(wait=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _publish_remote(self) -> None:
        fs, staging = filesystem(self.staging)
        _, target = filesystem(self.target)
        for name in (LAST, "adapter_config.json"):  # from here on the old model is not loadable
            if name in list_folder(self.target):
                fs.rm_file(join(target, name))
        new = [name for name in list_folder(self.staging) if name != JOURNAL]
        for name in list_folder(self.target):
            if name not in new:
                fs.rm_file(join(target, name))
        for name in sorted(new, key=lambda name: name in (LAST, "adapter_config.json")):
            fs.cp_file(join(staging, name), join(target, name))
        for name in list_folder(self.staging):
            self._remove(name)

    def _remove(self, name: str) -> None:
        if self.remote:
            fs, path = filesystem(join(self.staging, name))
            fs.rm_file(path)
        else:
            os.remove(join(self.staging, name))

    def _put_back(self) -> None:
        """A kill between the two renames of a replacement left the old model aside: it returns."""
        if not self.remote and os.path.isdir(self._old):
            if os.path.lexists(self.target):
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.target)
                log.warning("%s: put back as it was before an interrupted replacement", self.target)

    def _take_lock(self) -> None:
        self._lock = os.open(join(self.staging, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise UserError(f"target={self.target}: another process is exporting there; wait for it") from None
        except OSError as error:
            log.warning("%s: no file locks here (%s); don't export there twice at a time", self.staging, error)


def copy_range(source: str, start: int, stop: int, out: BinaryIO, remote: bool) -> None:
    """Appends bytes `[start, stop)` of a file: inside the kernel where both are local, else in pieces."""
    if not remote and not is_remote(source):
        out.flush()
        with open(source, "rb") as file:
            done = _copy_in_kernel(file.fileno(), out.fileno(), start, stop, out.tell())
        out.seek(0, os.SEEK_END)
        start += done
    if start < stop:
        data = open_bytes(source)
        for at in range(start, stop, COPY_BYTES):
            out.write(data.read(at, min(at + COPY_BYTES, stop)))


def _copy_in_kernel(source: int, target: int, start: int, stop: int, at: int) -> int:
    """Returns how many bytes were copied: fewer than asked for where the file systems do not support it."""
    done = 0
    while start + done < stop:
        try:
            count = os.copy_file_range(source, target, min(stop - start - done, 1 << 30), start + done, at + done)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                return done
            raise
        if count == 0:
            return done
        done += count
    return done


def total_bytes(paths: Iterable[str]) -> int:
    return sum(open_bytes(path).size_bytes for path in paths)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
