"""Where vLLM runs: in its container, or as a process on this machine, behind one interface."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from typing import Protocol

from gemma4_tpu.children import end_with_parent
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.serving.checks import ServeChecked
from gemma4_tpu.serving.command import (
    cache_folder,
    container_name,
    inherited,
    process_environment,
    process_words,
    run_words,
    shown,
)
from gemma4_tpu.serving.engine import ContainerEngine, State

log = logging.getLogger(__name__)

_LEAVING_SECONDS = 5.0
"""A process whose log has ended exits soon after."""
_LEFT_SECONDS = 2.0
"""What an ended vLLM has left gets this long to end by itself: Python's tracker then frees its memory in /dev/shm."""


class VllmRunner(Protocol):
    """Runs one vLLM; `remove` leaves nothing of it."""

    command: str
    """For a shell."""
    stopping: str
    """The effect of Ctrl-C."""
    stopped: str
    """The state afterwards."""

    def prepare(self) -> str | None:
        """Makes sure that vLLM is available; returns the digest of its image, if it has one."""

    def start(self) -> str:
        """Starts it; returns a description."""

    def follow(self) -> subprocess.Popen[bytes]:
        """A process that prints the server's output, and ends with it."""

    def state(self) -> State:
        """Whether it runs, and how it ended."""

    def stop(self, seconds: int) -> None:
        """Asks it to stop, and kills it after `seconds`."""

    def remove(self) -> None:
        """Removes everything, running or not."""


def runner_of(serving: ServingConfig, checked: ServeChecked) -> VllmRunner:
    """The runner that `serving.runner` names."""
    return ContainerRunner(serving, checked) if serving.runner == "docker" else ProcessRunner(serving, checked)


class ContainerRunner:
    """vLLM in a container of `serving.engine`."""

    stopping, stopped = "stops the server and removes its container", "the server is stopped and its container removed"

    def __init__(self, serving: ServingConfig, checked: ServeChecked):
        self._image, self._name = serving.image, container_name(serving)
        self._words = run_words(serving, checked)
        self._engine = ContainerEngine(serving.engine)
        self._container = ""
        self.command = f"{serving.engine} {shown(self._words)}"

    def prepare(self) -> str | None:
        """Makes sure that engine and image are available."""
        self._engine.check()
        if (digests := self._engine.digests(self._image)) is None:
            log.info("fetching %s …", self._image)
            self._engine.pull(self._image)
            digests = self._engine.digests(self._image)
        if not digests:
            return None
        if "@" not in self._image:
            log.info("%s is %s; serving.image=<that> pins it permanently", self._image, digests[0])
        return digests[0]

    def start(self) -> str:
        """Starts the container."""
        self._container = self._engine.run(self._words, self._name)
        return f"container {self._container[:12]}"

    def follow(self) -> subprocess.Popen[bytes]:
        """The engine's `logs`."""
        return self._engine.logs(self._container)

    def state(self) -> State:
        """Asks the engine."""
        return self._engine.state(self._container)

    def stop(self, seconds: int) -> None:
        """Asks the engine to stop it."""
        self._engine.stop(self._container, seconds)

    def remove(self) -> None:
        """Removes the container."""
        self._engine.remove(self._container)


class ProcessRunner:
    """vLLM as a process on this machine, in its own session with everything that it starts."""

    stopping, stopped = "stops the server", "the server and its processes are stopped"

    def __init__(self, serving: ServingConfig, checked: ServeChecked):
        self._executable, self._words = serving.executable, process_words(serving, checked)
        self._environment = process_environment(serving, checked)
        pairs = [f"{name}={value}" for name, value in self._environment.items()]
        self.command = shown(["env", *pairs, *self._words])
        self._cache = cache_folder(serving)

    def prepare(self) -> None:
        """Makes sure that the command exists."""
        if shutil.which(self._executable) is None:
            raise UserError(
                f"serving.executable={self._executable}: no such command; it must be vLLM's, in a separate environment"
                " (make vllm installs the CPU build into .venv-vllm)"
            )

    def start(self) -> str:
        """Starts vLLM. If this process is killed, vLLM ends too (on Linux)."""
        try:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=inherited() | self._environment, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        except OSError as error:
            raise UserError(
                f"serving.executable={self._executable}: can't be run ({error.strerror}); was its environment moved?"
            ) from None
        self._reaper = threading.Thread(target=self._reap, name="vllm-reaper", daemon=True)
        self._reaper.start()
        return f"process {self._process.pid}"

    def follow(self) -> subprocess.Popen[bytes]:
        """The process itself."""
        return self._process

    def state(self) -> State:
        """Waits briefly, because the log ends before the process does."""
        try:
            code = self._process.wait(_LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            return State(running=True, exit_code=0, out_of_memory=False)
        return State(running=False, exit_code=code if code >= 0 else 128 - code, out_of_memory=False)

    def stop(self, seconds: int) -> None:
        """Sends SIGTERM to vLLM, which ends its own processes, and SIGKILL to all of them after `seconds`."""
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._kill()
        self._reaper.join()

    def remove(self) -> None:
        """Kills what is left."""
        if self._process.poll() is None:
            self._kill()
        self._reaper.join()

    def _reap(self) -> None:
        """Kills what vLLM left behind some time after it ended, so that its log ends as well."""
        self._process.wait()
        until = time.monotonic() + _LEFT_SECONDS
        while self._signal(0) and time.monotonic() < until:
            time.sleep(0.02)
        self._kill()

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> bool:
        """Sends a signal to all of its processes; whether there are any."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True
