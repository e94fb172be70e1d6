"""The container engine's command line (Docker's, which Podman follows)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.children import end_with_parent, run_logged
from gemma4_tpu.errors import UserError
from gemma4_tpu.redact import redact

STDERR = 2
CLIENT_KEY = "OPENAI_API_KEY"
"""Environment variable for clients' API key; vLLM's own client reads it too."""
ANSWER_SECONDS = 120.0
"""Time limit for commands that should return at once."""
_REMEDIES = (
    ("cannot connect to the docker daemon", "is it running? sudo systemctl start docker"),
    ("permission denied", "may this user use it? sudo usermod -aG docker $USER and log in again, or"
     " serving.engine='sudo --preserve-env=HF_TOKEN docker'"),
    ("is already in use by container", "a server is running there, or was left behind; stop it with"
     " docker rm -f {name}, or set another serving.port"),
    ("no such object", "no server on that port runs on this machine; python -m gemma4_tpu.serve starts one"),
    ("could not select device driver", "containers need NVIDIA's container toolkit to use GPUs; install it"),
    ("manifest unknown", "no such image; look for its tags and give serving.image=<name>:<version>"),
    ("not found", "no such image; look for its tags and give serving.image=<name>:<version>"),
    ("pull access denied", "no such image, or it is private (docker login)"),
    ("no space left on device", "the disk is full; the image takes about 20 GB; see docker system df"),
    ("no such host", "this machine can't reach the registry"),
)  # fmt: skip
"""Part of an error message, in lower case → what to do."""


@dataclass(frozen=True)
class State:
    """The state of a container."""

    running: bool
    exit_code: int
    out_of_memory: bool
    """The kernel killed it because host memory ran out (not HBM)."""


def exec_words(container: str, words: Sequence[str]) -> list[str]:
    """What follows the engine's name to run a command in a container; secrets are passed by name."""
    return ["exec", *(["--env", CLIENT_KEY] if os.environ.get(CLIENT_KEY) else []), container, *words]


class ContainerEngine:
    """Runs one container; none of its methods leaves a process behind."""

    def __init__(self, command: str):
        self._words = shlex.split(command)
        self._command = command

    def check(self) -> None:
        """Raises `UserError` if the engine is not installed or does not respond."""
        if not self._words or shutil.which(self._words[0]) is None:
            raise UserError(
                f"serving.engine={self._command}: no such command; install Docker, or set serving.engine=podman"
                " (dry_run=true shows the command without one)"
            )
        self._ask("version")

    def digests(self, image: str) -> list[str] | None:
        """`<name>@sha256:…` of a local image (empty if it was built here); None if there is no such image."""
        done = self._call("image", "inspect", "--format", "{{json .RepoDigests}}", image)
        return None if done.returncode else json.loads(done.stdout) or []

    def pull(self, image: str) -> None:
        """Pulls the image; the engine's progress goes to stderr."""
        done = subprocess.run(
            [*self._words, "pull", image], stdin=subprocess.DEVNULL, stdout=STDERR,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
        if done.returncode:
            raise self._refusal("pull", done.stderr)

    def run(self, words: Sequence[str], name: str) -> str:
        """Starts a container (`run --detach …`) and returns its id; on failure, nothing of it is left."""
        done = self._call(*words)
        made = done.stdout.strip().splitlines()
        if done.returncode == 0 and made:
            return made[-1]
        if made:
            self.remove(made[-1])
        raise self._refusal("run", done.stderr, name)

    def logs(self, container: str) -> subprocess.Popen[bytes]:
        """Follows the container's output, from start to end."""
        return subprocess.Popen(
            [*self._words, "logs", "--follow", container], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip

    def state(self, container: str) -> State:
        """Whether the container runs, and how it ended."""
        told = json.loads(self._ask("inspect", "--format", "{{json .State}}", container))
        return State(bool(told["Running"]), int(told["ExitCode"]), bool(told.get("OOMKilled")))

    def execute(self, container: str, words: Sequence[str], output: Path) -> int:
        """Runs a command in the container, appends its output to a file without secrets, and returns its exit code.

        Ending this process does not end the command, which belongs to the container.
        """
        return run_logged([*self._words, *exec_words(container, words)], output)

    def ask_inside(self, container: str, words: Sequence[str]) -> str | None:
        """Output of a short command in the container; None if it failed."""
        done = self._call(*exec_words(container, words))
        return None if done.returncode else done.stdout

    def stop(self, container: str, seconds: int) -> None:
        """Asks the container to stop, and kills it after `seconds`."""
        self._call("stop", "-t", str(seconds), container, timeout=seconds + ANSWER_SECONDS)

    def remove(self, container: str) -> None:
        """Removes the container, running or not, with its volumes."""
        self._call("rm", "--force", "--volumes", container)

    def _call(self, *words: str, timeout: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*self._words, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=timeout, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"{self._command} {words[0]}: no answer within {timeout:.0f} s") from None

    def _ask(self, *words: str) -> str:
        done = self._call(*words)
        if done.returncode:
            raise self._refusal(words[0], done.stderr)
        return done.stdout

    def _refusal(self, verb: str, said: str, name: str = "<name>") -> UserError:
        lines = [line for line in redact(said).splitlines() if line.strip()] or ["(no output)"]
        text = said.lower()
        remedy = next((advice for part, advice in _REMEDIES if part in text), None)
        advice = f"; {remedy.format(name=name)}" if remedy else ""
        return UserError(f"{self._command} {verb} failed: {' '.join(lines[:2]).strip()}{advice}")
