"""Checksums over the files of a checkpoint: written when all of them are there, compared before anything is restored.

Works on local folders and gs://, without JAX.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from gemma4_tpu.storage import filesystem, join

FILE = "checksums.json"
_COMMITTED = "commit_success.txt"  # Orbax writes it last of all
_ABOUT = "_CHECKPOINT_METADATA"  # to which Orbax adds the time of the commit, after the checksums are written
_COMMIT_TIME = "commit_timestamp_nsecs"
_BLOCK_BYTES = 8 << 20


def write(folder: str) -> None:
    """Writes `checksums.json` into a checkpoint whose files are all there."""
    fs, root = filesystem(folder)
    sums = {name: _sha256(fs, path) for name, path in _files(fs, root).items()}
    fs.pipe_file(join(root, FILE), json.dumps({"sha256": sums}, indent=1).encode())


def problem(folder: str) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: every byte is as it was saved."""
    if not is_finished(folder):
        return "the save did not come to its end"
    fs, root = filesystem(folder)
    try:
        expected: dict[str, str] = json.loads(fs.cat_file(join(root, FILE)))["sha256"]
        names = list(expected)
    except (ValueError, KeyError, TypeError):
        return f"{FILE} is damaged"
    found = _files(fs, root)
    for name in names:
        if name not in found:
            return f"{name} is missing"
        if _sha256(fs, found[name]) != expected[name]:
            return f"{name} holds other bytes than were saved"
    return None


def is_finished(folder: str) -> bool:
    """Whether the save came to its end."""
    fs, root = filesystem(folder)
    return fs.exists(join(root, _COMMITTED)) and fs.exists(join(root, FILE))


def recorded(folder: str) -> bytes:
    """The checksums of a checkpoint as they were written: no other checkpoint has the same."""
    fs, root = filesystem(folder)
    return fs.cat_file(join(root, FILE))


def _files(fs: Any, root: str) -> dict[str, str]:
    """Name in the folder → path, sorted; without the two files that come after the checksums."""
    root = root.rstrip("/")
    named = {path[len(root) + 1 :]: path for path in sorted(fs.find(root))}
    return {name: path for name, path in named.items() if name not in (FILE, _COMMITTED)}


def _sha256(fs: Any, path: str) -> str:
    if path.endswith("/" + _ABOUT):
        return hashlib.sha256(_without_commit_time(fs.cat_file(path))).hexdigest()
    digest = hashlib.sha256()
    with fs.open(path, "rb", block_size=_BLOCK_BYTES) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _without_commit_time(text: bytes) -> bytes:
    try:
        about = json.loads(text)
        return json.dumps({key: about[key] for key in sorted(about) if key != _COMMIT_TIME}).encode()
    except (ValueError, TypeError, AttributeError):
        return text
