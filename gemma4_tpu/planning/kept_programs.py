"""Caches compiled programs on disk by content: a second plan of the same program reads what the first one compiled.

The key is a hash of the lowered program, the compiler's version, its options and the devices. Files are complete or
absent, so that any number of plans can share the folder; unreadable files count as absent.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the cached data (`program.Program`); incremented when its fields change."""
KEPT_BYTES = 2 * 2**30
"""Size limit; beyond it, the least recently used files are removed."""


def folder() -> Path:
    """`gemma4_tpu/plans` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser().absolute() / "gemma4_tpu" / "plans"


def key(lowered: str, versions: Mapping[str, str], options: Mapping[str, Any], devices: list[str]) -> str:
    """The cache key of a program.

    Args:
      lowered: its text before compilation, without debugging information.
      versions: of the compiler.
      options: for the compiler.
      devices: their kinds and positions, in the program's order.
    """
    rest = json.dumps([FORMAT, dict(versions), dict(options), devices], sort_keys=True)
    return hashlib.sha256(f"{rest}\n{lowered}".encode()).hexdigest()[:32]


def readers() -> str:
    """A hash of the modules that read programs: results of other versions are not used."""
    here = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in here)).hexdigest()[:12]


def get(name: str) -> Any:
    """The cached value for a key; None if there is none, or it is unreadable."""
    path = _path(name)
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        os.utime(path)
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    return found


def put(name: str, value: Any) -> None:
    """Caches plain values under a key. If the folder is not writable, logs that and continues."""
    path = _path(name)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(gzip.compress(json.dumps(value).encode(), 3))
        part.replace(path)
        _tidy(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        log.warning("cannot cache the compiled program: %s", error)


def _path(name: str) -> Path:
    return folder() / f"{name}.json.gz"


def _tidy(place: Path) -> None:
    """Removes the least recently used files, down to `KEPT_BYTES`; another plan can do the same concurrently."""
    used = []
    for path in place.glob("*.json.gz"):
        with suppress(OSError):
            told = path.stat()
            used.append((told.st_mtime, told.st_size, path))
    total = 0
    for _, size, path in sorted(used, reverse=True):
        total += size
        if total > KEPT_BYTES:
            path.unlink(missing_ok=True)
