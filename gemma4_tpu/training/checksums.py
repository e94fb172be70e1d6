"""Checksums over the contents of a checkpoint: written when it is complete, verified before anything is restored.

They cover the items: every file in a subfolder (`state/`, `position/`, `metrics/`). Those are final when Orbax calls
`post_finalization_callback`. Files next to the subfolders are excluded: Orbax writes `_CHECKPOINT_METADATA` (types and
times) in a thread that it joins only later, and `commit_success.txt` last. Nothing is restored from those two, and
Orbax 0.12 reads checkpoints whose metadata is missing or damaged.

Works on local folders and gs://, without JAX.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from gemma4_tpu.storage import filesystem, join

FILE = "checksums.json"
_COMMITTED = "commit_success.txt"  # Orbax writes it last
_ABOUT = "_CHECKPOINT_METADATA"
_BLOCK_BYTES = 8 << 20


def write(folder: str) -> None:
    """Writes `checksums.json` into a checkpoint whose items are complete."""
    fs, root = filesystem(folder)
    sums = {name: _sha256(fs, path) for name, path in _files(fs, root).items()}
    fs.pipe_file(join(root, FILE), json.dumps({"sha256": sums}, indent=1).encode())


def problem(folder: str) -> str | None:
    """What is wrong with a checkpoint, in a few words; None: every byte of its items is as it was saved."""
    if not is_finished(folder):
        return "the save was interrupted"
    fs, root = filesystem(folder)
    try:
        expected: dict[str, str] = json.loads(fs.cat_file(join(root, FILE)))["sha256"]
        names = [name for name in expected if name != _ABOUT]  # earlier versions listed it too, sometimes half-written
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        return f"{FILE} is damaged"
    found = _files(fs, root)
    for name in names:
        if name not in found:
            return f"{name} is missing"
        if _sha256(fs, found[name]) != expected[name]:
            return f"{name} differs from what was saved"
    return None


def is_finished(folder: str) -> bool:
    """Whether the save was completed."""
    fs, root = filesystem(folder)
    return fs.exists(join(root, _COMMITTED)) and fs.exists(join(root, FILE))


def recorded(folder: str) -> bytes:
    """The checksums of a checkpoint as they were written; unique to it."""
    fs, root = filesystem(folder)
    return fs.cat_file(join(root, FILE))


def _files(fs: Any, root: str) -> dict[str, str]:
    """Name in the folder → path, sorted, of the items' files."""
    root = root.rstrip("/")
    named = {path[len(root) + 1 :]: path for path in sorted(fs.find(root))}
    return {name: path for name, path in named.items() if "/" in name}


def _sha256(fs: Any, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb", block_size=_BLOCK_BYTES) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
