"""The destination of an export: a staging folder next to the target, which becomes the target in one rename.

The staging folder is `.<name>.partial`. Its journal lists finished files with their checksums, so a killed export
resumes with the file that it was writing. The journal stays in the target: it records what the model was made from, and
lets the same export, if started again, recognise that it is done. On gs:// a rename copies each object; there the
journal, which marks them as an export's, comes first, and `config.json`, without which nothing loads, last.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.export.writer import DiskFile, Writer, checksum
from gemma4_tpu.storage import filesystem, is_remote, join, list_folder, open_bytes, read_json
from gemma4_tpu.tracking.files import write_text

log = logging.getLogger(__name__)

JOURNAL, LOCK, PART = "gemma4_tpu.json", ".lock", ".part"
LOADED = {"config.json", "adapter_config.json"}
"""Files without which a model or an adapter does not load."""
UPLOAD_BYTES = 32 << 20  # per request


class Unfinished(UserError):
    """Stopped halfway: finished files stay in the staging folder, and the same command resumes from them."""


class Place:
    """A target folder, local or remote, and the staging folder next to it."""

    def __init__(self, target: str):
        # the place itself, not a link to it: renames would replace the link
        self.target = target.rstrip("/") if is_remote(target) else os.path.realpath(target)
        parent, name = os.path.split(self.target)
        self.parent, self.staging = parent, join(parent, f".{name}.partial")
        self._old = join(parent, f".{name}.replaced")
        self.remote = is_remote(target)
        self.journal: dict[str, Any] = {}
        self.published = False
        """Whether the target already contains exactly this export; then nothing is written."""
        self._lock: int | None = None

    def check(self, identity: dict[str, Any], overwrite: bool, made_from: Iterable[str] = ()) -> None:
        """Raises `UserError` if the target exists, is not exactly this export, and may or can not be replaced.

        Args:
          identity: of this export.
          overwrite: whether an existing model or adapter may be replaced.
          made_from: files and folders that the export reads.
        """
        self._put_back()
        if not self._exists():
            return
        if not overwrite and self._is_this_export(identity):
            log.info("%s: already contains this export, with matching checksums", self.target)
            self.journal, self.published = self._read_journal(self.target), True
        elif (reason := self._irreplaceable(made_from)) is not None:
            raise UserError(f"target={self.target}: {reason}")
        elif not overwrite:
            raise UserError(f"target={self.target}: exists; give overwrite=true to replace it, or another target")

    def _exists(self) -> bool:
        if self.remote:  # with the journal, but without what loads, it is an interrupted upload
            names = set(list_folder(self.target))
            return bool(names) and (JOURNAL not in names or not LOADED.isdisjoint(names))
        return os.path.lexists(self.target)

    def _is_this_export(self, identity: dict[str, Any]) -> bool:
        found = self._read_journal(self.target)
        same = found.get("identity") == identity and set(list_folder(self.target)) == {JOURNAL, *found["files"]}
        return same and self._whole(found["files"], self.target) == found["files"]

    def _irreplaceable(self, made_from: Iterable[str]) -> str | None:
        """Why the existing target must not be replaced even with overwrite=true, and what to do; None: it can be."""
        if not self.remote and not os.path.isdir(self.target):
            return "a file, not a folder; give another target"
        if not self.remote and os.path.ismount(self.target):
            return "a mount point, which can't be renamed; give a folder in it"
        for path in made_from:
            if _is_in(path, self.target):
                return f"contains {path}, from which this export is made; give another target"
        names = list_folder(self.target)
        if names and LOADED.isdisjoint(names):
            return (
                f"exists, and is neither a model nor an adapter (contains {', '.join(names[:5])}), which is all that"
                " overwrite=true replaces; give another target, or remove it"
            )
        return None

    def open(self, identity: dict[str, Any], needed_bytes: int) -> None:
        """Creates the staging folder, or resumes from that of an interrupted export with the same identity.

        Raises:
          UserError: another process is writing there, or there is not enough space.
        """
        if self.published:
            return
        if not self.remote:
            try:
                os.makedirs(self.staging, exist_ok=True)
            except OSError as error:
                raise UserError(f"target={self.target}: can't write there ({error.strerror}); give another") from None
            self._take_lock()
        names = list_folder(self.staging)
        found = self._read_journal(self.staging)
        self.journal = {"identity": identity, "files": {}}
        if found.get("identity") == identity:
            self.journal["files"] = self._whole(found["files"], self.staging)
            log.info("resuming an interrupted export: %d files are done", len(self.journal["files"]))
        elif found:
            log.info("%s: removing the files of another export", self.staging)
        for name in set(names) - {LOCK, JOURNAL} - set(self.journal["files"]):
            self._remove(name)
        self._check_space(needed_bytes - sum(entry["bytes"] for entry in self.journal["files"].values()))

    def _read_journal(self, folder: str) -> dict[str, Any]:
        """The folder's journal; empty if it is missing or damaged."""
        try:
            found = read_json(join(folder, JOURNAL)) if JOURNAL in list_folder(folder) else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}

    def _whole(self, files: dict[str, Any], folder: str) -> dict[str, Any]:
        """Those of a journal's files whose bytes are still the ones written."""
        there = set(list_folder(folder))
        whole = {}
        for name, noted in files.items():
            if name in there and stamp(join(folder, name)) == noted["stamp"]:
                whole[name] = noted
            else:
                log.warning("%s: its bytes are not the ones written", join(folder, name))
        return whole

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
                " free some space, or give a target on another disk"
            )

    def done(self, name: str) -> dict[str, Any] | None:
        """The journal's notes about a finished file; None: it is not written yet."""
        return self.journal["files"].get(name)

    def create(self, name: str) -> Writer:
        """Opens a file to write from start to end, in a `with` block; call `finish` inside it."""
        path = join(self.staging, name)
        return Writer(RemoteFile(path) if self.remote else DiskFile(path + PART))

    def finish(self, name: str, file: Writer, **notes: Any) -> None:
        """Completes a file: stored, under its name, in the journal with `notes`."""
        written = file.finish()
        if self.remote:
            written = stamp(join(self.staging, name))
        else:
            os.replace(join(self.staging, name) + PART, join(self.staging, name))
        self.journal["files"][name] = {"bytes": file.size_bytes, "stamp": written, **notes}
        self.write(JOURNAL, json.dumps(self.journal, sort_keys=True))

    def write(self, name: str, text: str) -> None:
        """Writes a small file at once."""
        if self.remote:
            fs, path = filesystem(join(self.staging, name))
            fs.pipe_file(path, text.encode())
        else:
            write_text(Path(self.staging) / name, text)

    def publish(self) -> str:
        """Renames the staging folder to the target (replacing an existing one), and returns the target."""
        if self.published:
            return self.target
        if self.remote:
            self._publish_remote()
        else:
            with suppress(FileNotFoundError):
                os.remove(join(self.staging, LOCK))
            if os.path.lexists(self.target):
                os.rename(self.target, self._old)
            os.rename(self.staging, self.target)
            _sync_folder(self.parent)
            shutil.rmtree(self._old, ignore_errors=True)
        self.close()
        return self.target

    def discard(self) -> None:
        """Removes the staging folder."""
        if self.published:
            return
        if self.remote:
            for name in list_folder(self.staging):
                self._remove(name)
        else:
            shutil.rmtree(self.staging, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Releases the lock on the staging folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _publish_remote(self) -> None:
        fs, staging = filesystem(self.staging)
        _, target = filesystem(self.target)
        for name in LOADED & set(list_folder(self.target)):  # from here on the old model is not loadable
            fs.rm_file(join(target, name))
        new = list_folder(self.staging)
        for name in list_folder(self.target):
            if name not in new:
                fs.rm(join(target, name), recursive=True)
        for name in sorted(new, key=lambda name: (name in LOADED, name != JOURNAL)):
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
        """Restores the old model if a kill between a replacement's two renames left it set aside."""
        if not self.remote and os.path.isdir(self._old):
            if os.path.lexists(self.target):
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.target)
                log.warning("%s: restored after an interrupted replacement", self.target)

    def _take_lock(self) -> None:
        self._lock = os.open(join(self.staging, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.close()
            raise UserError(f"target={self.target}: another process is exporting there; wait for it") from None
        except OSError as error:
            log.warning("%s: no file locks here (%s); do not run two exports to it at once", self.staging, error)


class RemoteFile:
    """A new object, uploaded piece by piece; it exists once it is closed."""

    def __init__(self, path: str):
        fs, place = filesystem(path)
        self._file = fs.open(place, "wb", block_size=UPLOAD_BYTES)
        self.write, self.close = self._file.write, self._file.close

    def discard(self) -> None:
        """Aborts the upload, so that nothing is published."""
        self._file.discard()
        self._file.closed = True  # else its finalizer would close it, which publishes it


def stamp(path: str) -> str:
    """A stamp of a file, local or remote, that changes with its bytes."""
    if not is_remote(path):
        return checksum(path)
    fs, place = filesystem(path)
    about = fs.info(place)
    return f"{about['size']} {about.get('crc32c', '')}"


def total_bytes(paths: Iterable[str]) -> int:
    """Size of all files together, local or remote."""
    return sum(open_bytes(path).size_bytes for path in paths)


def _is_in(path: str, folder: str) -> bool:
    """Whether a path, local or remote, is that of a folder or of something in it."""
    place = path.rstrip("/") if is_remote(path) else os.path.realpath(path)
    return place == folder or place.startswith(join(folder, ""))


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
