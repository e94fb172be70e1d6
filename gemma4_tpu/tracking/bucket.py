"""A run folder on gs://: small files are kept in a local folder and copied; checkpoints are written directly.

The bucket holds the authoritative copy. A start copies the small files here; each checkpoint, and the end of the run,
copies changed ones back, so that any machine can resume the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from gemma4_tpu.storage import Deadline, filesystem, join

log = logging.getLogger(__name__)

_SECONDS_AT_THE_ENDS = 60.0
"""How long a command waits for its bucket at its start and end; `storage.deadline` applies while it trains."""
CHECKPOINTS = "checkpoints"
PROFILE = "profile"
"""Folder of traces, which are copied to the bucket but not back."""


class Bucket:
    """The small files of one run folder, local and remote."""

    def __init__(self, remote: str, local: Path):
        self.remote = remote.rstrip("/")
        self.local = local
        self._copied: dict[str, tuple[int, int]] = {}
        self.gone = False
        """The bucket did not answer in time; nothing is copied to it any more."""

    @classmethod
    def of(cls, remote: str, root: Path) -> Bucket:
        """With the local folder `<root>/<bucket>/<path>`; raises `UserError` where gcsfs is not installed."""
        filesystem(remote)
        scheme, _, place = remote.rstrip("/").partition("://")
        return cls(remote, root.expanduser().absolute() / scheme / place)

    def reach(self, call: Callable[[], None]) -> None:
        """Runs `pull` or `push`, retrying for a while.

        Raises:
          StorageGone: the bucket does not answer.
        """
        Deadline(_SECONDS_AT_THE_ENDS).wait_for(self.remote, call, again=True)

    def pull(self) -> None:
        """Copies the small files here, over what an earlier start left."""
        fs, root = filesystem(self.remote)
        root = root.rstrip("/")
        for path in fs.find(root) if fs.exists(root) else []:
            name = path[len(root) + 1 :]
            if _is_small(name) and not name.startswith(f"{PROFILE}/"):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                (self.local / name).write_bytes(fs.cat_file(path))
                self._copied[name] = _state(self.local / name)

    def push(self) -> None:
        """Copies the small files that changed since the last copy there."""
        if self.gone:
            return
        fs, root = filesystem(self.remote)
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            if path.is_file() and _is_small(name) and self._copied.get(name) != (state := _state(path)):
                fs.pipe_file(join(root, name), path.read_bytes())
                self._copied[name] = state


def _is_small(name: str) -> bool:
    """Everything except checkpoints, exports, hidden files such as locks, and what W&B stores besides offline
    records.
    """
    parts = name.split("/")
    if "wandb" in parts and ("logs" in parts or not any(p.startswith("offline-run-") for p in parts)):
        return False
    return parts[0] not in (CHECKPOINTS, "merged", "adapter") and not any(p.startswith(".") for p in parts)


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
