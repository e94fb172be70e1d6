"""Temporary folders that are gone however the process ends, SIGKILL aside: also where it ends without unwinding.

`errors.exit_now` and the interpreter's own end remove what is left of them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_made: dict[Path, int] = {}
"""Folder → the process that made it, since a forked child is not to remove it."""


def make_folder(prefix: str = "gemma4_tpu_", parent: Path | None = None) -> Path:
    """A new empty folder; `parent`: where, instead of where temporary files go."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    _made[folder] = os.getpid()
    return folder


def remove_folder(folder: Path) -> None:
    """Removes a folder and its contents."""
    shutil.rmtree(folder, ignore_errors=True)
    _made.pop(folder, None)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the time that this is open."""
    folder = make_folder()
    try:
        yield folder
    finally:
        remove_folder(folder)


def made() -> list[str]:
    """The folders that this process has made and not removed."""
    return [str(folder) for folder, pid in list(_made.items()) if pid == os.getpid()] if _made else []


@atexit.register
def remove_all() -> None:
    """Those that this process has made and not removed."""
    for folder in made():
        remove_folder(Path(folder))
