"""One compilation in a separate process: it can be stopped, its memory is returned, and several can run concurrently.

This is the waiting side; the process is `child.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.config.load import to_yaml
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.errors import UserError

REQUEST, DUMP = "request.json", "dump"
ASSIGNED, FINISHED = "assigned", "finished"
"""Stages of a compilation and of its answers: memory is assigned; code is generated and the schedule is known."""
WRITTEN = "written "
"""Printed on stdout before a stage whose answer is ready."""


@dataclass(frozen=True)
class CompilationRequest:
    """What to compile."""

    config: PlanRoot
    """With a remat policy other than `auto`."""


class Compilation:
    """A compilation in progress."""

    def __init__(self, request: CompilationRequest, stage: Callable[[str], None] = lambda name: None):
        self._folder = tempfile.TemporaryDirectory(prefix="gemma4-plan-")
        self._place = Path(self._folder.name)
        content = {"config": to_yaml(request.config)}
        (self._place / REQUEST).write_text(json.dumps(content), encoding="utf-8")
        self._errors = (self._place / "stderr").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gemma4_tpu.planning.child", str(self._place)],
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reached = {ASSIGNED: threading.Event(), FINISHED: threading.Event()}
        self._reader = threading.Thread(target=self._listen, args=(stage,), daemon=True)
        self._reader.start()

    def _listen(self, stage: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(WRITTEN):
                self._reached[line.removeprefix(WRITTEN).strip()].set()
            else:
                stage(line.strip())
        for event in self._reached.values():  # the process has ended, one way or another
            event.set()

    def wait(self, seconds: float | None = None, stage: str = ASSIGNED) -> dict[str, Any] | None:
        """The answer (`answers.Answer`); None if it is not ready after `seconds`.

        Raises:
          UserError: the compiler refused the configuration.
          RuntimeError: it failed in another way; contains the end of its output.
        """
        if not self._reached[stage].wait(seconds):
            return None
        try:
            answer = json.loads((self._place / f"{stage}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            code = self._process.wait()
            raise RuntimeError(f"the compiling process ended with {_signal(code)}:\n{self._said()}") from None
        if "refused" in answer:
            raise UserError(answer["refused"])
        return answer

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-3000:].strip()

    def close(self) -> None:
        """Stops it if it is still running, and removes its folder."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._errors.close()
        with suppress(OSError):
            self._folder.cleanup()


def _signal(code: int) -> str:
    if code == -9:
        return "signal 9 (was the machine out of memory? A whole 31B takes about 5 GB)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
