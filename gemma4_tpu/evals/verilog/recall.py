"""Caches the results about a benchmark's benches, by simulator version."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma4_tpu.config.tasks import JudgeConfig
from gemma4_tpu.evals.problems import Problem
from gemma4_tpu.evals.verilog.iverilog import Tools

log = logging.getLogger(__name__)
RULES_VERSION = 4
"""Increased with every change that could alter the result of a reference, a stub or a mutant."""


def fingerprint(problem: Problem) -> str:
    """Fingerprint of everything on which a reference's result depends."""
    parts = {key: value for key, value in asdict(problem).items() if key not in ("name", "prompt", "official_rule")}
    text = json.dumps([RULES_VERSION, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Memory:
    """A file of rows by fingerprint. If it can't be read or written, only time is lost."""

    def __init__(self, what: str, config: JudgeConfig, tools: Tools):
        """Args:
        what: part of the file's name: `references` or `benches`.
        config: names the folder.
        tools: the simulator; results are kept by its version.
        """
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gemma4_tpu"
        self._file = Path(config.cache_dir or cache).expanduser() / f"{what}_iverilog_{tools.version}.json"

    def load(self) -> dict[str, dict[str, Any]]:
        """The stored rows."""
        try:
            rows = json.loads(self._file.read_text(encoding="utf-8"))
            return {key: row for key, row in rows.items() if isinstance(row, dict)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s is unreadable (%s): its results are computed again", self._file, error)
            return {}

    def store(self, rows: Mapping[str, dict[str, Any]]) -> None:
        """Adds rows."""
        if not rows:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({**self.load(), **rows}, indent=1), encoding="utf-8")
            part.replace(self._file)
        except OSError as error:
            log.warning("%s is not written: %s", self._file, error)
