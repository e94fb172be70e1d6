"""Where `vllm bench serve` runs: in the server's container, or by the server's own command on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gemma4_tpu.children import run_logged
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.scratch import scratch_folder
from gemma4_tpu.serving.command import MODEL_MOUNT, container_name, inherited, process_environment, shown
from gemma4_tpu.serving.engine import ContainerEngine, exec_words

PLACE = "/tmp/gemma4-bench"
"""Folder in the container for one run: the client's process id and its result."""
_START = 'rm -rf "$0" && mkdir "$0" && echo $$ > "$0/pid" && exec "$@"'
_KILL = 'kill "$(cat "$0/pid")"; rm -rf "$0"'
_RESULT = "result.json"


class VllmPlace(Protocol):
    """Runs vLLM's client once; leaves no process and no file behind."""

    model: str
    """The model's folder, as vLLM sees it."""

    def check(self) -> None:
        """Raises `UserError` if the client can't run."""

    def shown(self, words: Sequence[str]) -> str:
        """The whole command, for a shell."""

    def run(self, words: Sequence[str], output: Path) -> tuple[int, str | None]:
        """Runs the client; returns its exit code and the result's text, if there is one.

        Args:
          words: the words after `vllm`.
          output: file for the client's output, which is kept without secrets.
        """


def _result_words(folder: str) -> list[str]:
    return ["--result-dir", folder, "--result-filename", _RESULT]


class InContainer:
    """Runs the `vllm` of a container."""

    model = MODEL_MOUNT

    def __init__(self, serving: ServingConfig):
        self._container = container_name(serving)
        self._engine, self._command = ContainerEngine(serving.engine), serving.engine

    def check(self) -> None:
        """Raises `UserError` if there is no such container, or it is not running."""
        self._engine.check()
        if not self._engine.state(self._container).running:
            raise UserError(f"bench.cross_check=true: the container {self._container} is not running; start it")

    def shown(self, words: Sequence[str]) -> str:
        """The command, with the container engine in front."""
        return f"{self._command} {shown(exec_words(self._container, self._words(words)))}"

    def run(self, words: Sequence[str], output: Path) -> tuple[int, str | None]:
        """Runs the client in the container, and removes its folder there."""
        try:
            code = self._engine.execute(self._container, self._words(words), output)
        except BaseException:
            self._inside("sh", "-c", _KILL, PLACE)
            raise
        text = self._inside("cat", f"{PLACE}/{_RESULT}") if code == 0 else None
        self._inside("rm", "-rf", PLACE)
        return code, text

    def _words(self, words: Sequence[str]) -> list[str]:
        return ["sh", "-c", _START, PLACE, "vllm", *words, *_result_words(PLACE)]

    def _inside(self, *words: str) -> str | None:
        return self._engine.ask_inside(self._container, words)


class OnThisMachine:
    """Runs `serving.executable`."""

    def __init__(self, serving: ServingConfig, folder: Path | None):
        self._executable, self._environment = serving.executable, process_environment(serving, None)
        self.model = str(folder)

    def check(self) -> None:
        """Raises `UserError` if there is no such command."""
        if shutil.which(self._executable) is None:
            raise UserError(f"bench.cross_check=true: {self._executable}: the command is gone; install it again")

    def shown(self, words: Sequence[str]) -> str:
        """The command as it is."""
        return shown([self._executable, *words, *_result_words("<folder>")])

    def run(self, words: Sequence[str], output: Path) -> tuple[int, str | None]:
        """Runs the client, with its result in a temporary folder."""
        with scratch_folder() as folder:
            command = [self._executable, *words, *_result_words(str(folder))]
            code = run_logged(command, output, inherited() | self._environment)
            result = folder / _RESULT
            return code, result.read_text(encoding="utf-8") if code == 0 and result.is_file() else None
