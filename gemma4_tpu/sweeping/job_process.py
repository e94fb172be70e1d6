"""A running job: a separate process (fresh JAX, its own flags and session, so that Ctrl-C reaches only the parent), or
one that an earlier parent left behind.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from gemma4_tpu.config.lists import as_word
from gemma4_tpu.errors import PREEMPTED, TERMINATED, last_refusal, last_words
from gemma4_tpu.tracking.records import RESULT, result_of

log = logging.getLogger(__name__)

_STOPPED_BY_SIGNAL = (PREEMPTED, TERMINATED, -signal.SIGTERM)
"""Exit codes after a SIGTERM: saved; did not have to wait; before Python could handle it."""


def command(entry: str, words: Sequence[str], run_dir: Path) -> list[str]:
    """The command line of a job."""
    return [sys.executable, "-m", f"gemma4_tpu.{entry}", *words, as_word("run_dir", str(run_dir))]


class Child(ABC):
    """A running job, whose output is appended to `log_path`."""

    def __init__(self, pid: int, log_path: Path, run_dir: Path):
        self.pid, self.log_path, self.run_dir = pid, log_path, run_dir
        self.asked: str | None = None
        """Why it was asked to save and stop, if it was."""
        self.started = time.monotonic()
        self._metrics = Follower(run_dir / "metrics.jsonl")
        self._log_start = log_path.stat().st_size if log_path.is_file() else 0

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it); None while it runs."""

    @abstractmethod
    def terminate(self) -> None:
        """Sends SIGTERM: a training run saves at its next update and exits with code 42."""

    @abstractmethod
    def kill(self) -> None:
        """Ends it at once, with everything that it started."""

    def new_rows(self) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl` since the last call."""
        return self._metrics.new_rows()

    def ask_to_stop(self, why: str) -> None:
        """Calls `terminate`, once."""
        if self.asked is None:
            self.asked = why
            self.terminate()

    def stopped_by_signal(self) -> bool:
        """Whether it ended because of a SIGTERM; the same command resumes it."""
        return self.poll() in _STOPPED_BY_SIGNAL

    def error(self) -> str:
        """One line on why it failed: from its result, else the refusal or exception in its log, else its exit code."""
        code = self.poll() or 0
        with self.log_path.open("rb") as output:
            output.seek(self._log_start)
            printed = output.read().decode(errors="replace")
        if code < 0:
            memory = " (was the machine out of memory?)" if code == -signal.SIGKILL else ""
            return last_refusal(printed) or f"killed by signal {-code}{memory}"
        told = result_of(self.run_dir).values
        if told.get("status") == "failed" and told.get("error"):
            return str(told["error"])
        return last_words(printed) or f"exit code {code}"


class OwnChild(Child):
    """A child of this process."""

    def __init__(self, command: Sequence[str], log_path: Path, run_dir: Path, environment: Mapping[str, str]):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("a", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
            super().__init__(self._process.pid, log_path, run_dir)

    def poll(self) -> int | None:
        """As `Child.poll`."""
        return self._process.poll()

    def terminate(self) -> None:
        """As `Child.terminate`."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, to all of its session."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


class Orphan(Child):
    """A job whose parent was killed: it continues, and is followed by its pid and files."""

    def __init__(self, process: psutil.Process, log_path: Path, run_dir: Path):
        super().__init__(process.pid, log_path, run_dir)
        self._process = process

    @classmethod
    def of(cls, log_path: Path, run_dir: Path) -> Orphan | None:
        """The process on this machine that works in a run folder, by its command line: a parent can be killed before
        it has kept the pid. None: there is none.
        """
        word = as_word("run_dir", str(run_dir))
        known = psutil.process_iter(["cmdline", "create_time"])
        found = [each for each in known if word in (each.info["cmdline"] or ())]
        # What it has forked has the same command line.
        return cls(min(found, key=lambda each: each.info["create_time"]), log_path, run_dir) if found else None

    def poll(self) -> int | None:
        """Like `Child.poll`; only parents learn an exit code, so it is derived from the result."""
        if self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            return None
        path = self.run_dir / RESULT
        if not path.is_file() or path.stat().st_mtime < self._process.create_time():
            return PREEMPTED  # it was killed, and the same command resumes it
        return {"failed": 1, "preempted": PREEMPTED}.get(str(result_of(self.run_dir).values.get("status")), 0)

    def terminate(self) -> None:
        """As `Child.terminate`."""
        with suppress(psutil.NoSuchProcess):
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, to all of its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Follower:
    """Reads a growing `metrics.jsonl`. Rows that a resumed job writes again are returned once."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0
        self._told: set[tuple[int, bool]] = set()

    def new_rows(self) -> list[dict[str, Any]]:
        """The complete rows since the last call."""
        try:
            with self._path.open("rb") as file:
                # A resumed job rewrites the file without the rows after its checkpoint, which makes it shorter.
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        rows = []
        for line in complete.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # read while the file was being replaced
                self._offset = 0
                break
            key = (row["update"], "heldout_loss" in row)
            if key not in self._told:
                self._told.add(key)
                rows.append(row)
        return rows
