"""Work folders of judges, and access to files in them that sandboxed commands may have written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from gemma4_tpu.scratch import make_folder, remove_folder

MEMORY_FOLDER = Path("/dev/shm")
PREFIX, _LOCK = "gemma4_tpu_judge_", "owner.lock"


class WorkFolder:
    """A judge's folder, in memory if there is room. It is locked as long as the judge lives, however it ends.

    A judge that is killed together with its workers leaves its folder behind; the next judge to start removes it.
    """

    def __init__(self, needed_bytes: int):
        """Args:
        needed_bytes: the most that can be written there at one time.
        """
        parent = None
        # In containers, it often has only 64 MiB.
        if os.access(MEMORY_FOLDER, os.W_OK) and shutil.disk_usage(MEMORY_FOLDER).free >= needed_bytes:
            parent = MEMORY_FOLDER
        sweep()
        self.path = make_folder(f"{PREFIX}{os.getpid()}_", parent)
        self.path.chmod(0o711)  # workers run simulations as other users
        taken = self.path / f"{_LOCK}.new"
        self._lock = os.open(taken, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken.rename(self.path / _LOCK)  # so that it is never seen unlocked while its owner lives

    def remove(self) -> None:
        """Removes the folder and its contents."""
        remove_folder(self.path)
        os.close(self._lock)


def sweep() -> None:
    """Removes this user's folders of dead judges, whose locks nobody holds."""
    for folder in [
        found for place in {MEMORY_FOLDER, Path(tempfile.gettempdir())} for found in place.glob(f"{PREFIX}*")
    ]:
        with contextlib.suppress(OSError):  # no lock, another user's, held, or removed meanwhile
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not folder.is_symlink() and folder.stat().st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Writes new files, whatever a sandboxed compiler left under their names."""
    for name, text in files.items():
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("x", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)


def read(file: Path) -> str:
    """The text of a file that a sandboxed compiler may have written; refuses links and pipes."""
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
        return opened.read().decode("utf-8", "replace")
