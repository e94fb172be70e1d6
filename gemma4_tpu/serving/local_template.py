"""Chat templates, rendered in a process of their own: they come with a checkpoint, and may loop or fill the memory.

`python -m gemma4_tpu.serving.local_template` is that process. It reads a line of JSON with the template, then one for
each conversation, and answers each with a line; the kernel ends it where a conversation takes too much CPU time.
"""

from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

CPU_SECONDS = 5.0
"""Of one conversation; Google's templates take a few milliseconds."""
MEMORY_MIB = 512
"""Besides what the process holds when it is ready."""
_SHOWN = 300  # characters of a template's own message


class TemplateRefused(Exception):
    """The template does not render this conversation; says why."""


class TemplateProcess:
    """Renders one template; every method may be called from any thread."""

    def __init__(self, template: str, tokens: Mapping[str, str], *, cpu_seconds: float = CPU_SECONDS):
        """Args:
        template: as the tokenizer has it.
        tokens: special tokens by their names in templates, such as `bos_token`.
        cpu_seconds: of one conversation at most.
        """
        self._about = {"template": template, "tokens": dict(tokens), "cpu_seconds": cpu_seconds}
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, characters: int) -> str:
        """The conversation as a text of `characters` at most.

        Raises:
          TemplateRefused: the template doesn't take it, or takes too much time, memory or room.
        """
        asked = {"messages": messages, "options": options, "characters": characters}
        with self._lock:
            answer = self._ask(asked)
            if not answer:
                raise TemplateRefused(self._ended())
        found = json.loads(answer)
        if "text" not in found:
            raise TemplateRefused(found["refused"])
        return str(found["text"])

    def close(self) -> None:
        """Ends the process, whatever it does; who waits for it hears that it is refused."""
        self._closed = True
        self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        command = [sys.executable, "-m", "gemma4_tpu.serving.local_template"]
        self._process = subprocess.Popen(  # in a session of its own: Ctrl-C is for the server, which ends it
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert isinstance(self._process.stdout, io.FileIO)
        self._answers = io.BufferedReader(self._process.stdout)
        self._tell(self._about)

    def _tell(self, asked: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        rest = memoryview(json.dumps(asked).encode() + b"\n")
        while rest:
            rest = rest[self._process.stdin.write(rest) :]

    def _ask(self, asked: Mapping[str, Any]) -> bytes:
        try:
            self._tell(asked)
            return self._answers.readline()
        except OSError:  # it has ended
            return b""

    def _ended(self) -> str:
        """Why; another one is started for the next conversation."""
        code = self._process.wait()
        if self._closed:
            return "the server is stopped"
        self._start()
        if code == -signal.SIGPROF:
            return f"it takes more than {self._about['cpu_seconds']:g} s"
        return f"its process ended ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    about = json.loads(sys.stdin.buffer.readline())
    _limit_memory()
    # What started this process may ignore or block the timer's signal (some libraries profile by it), and hand that on.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, about["cpu_seconds"])  # nobody handles its signal: it ends the process
        asked = json.loads(line)
        try:
            options = {"chat_template": about["template"], **about["tokens"], **asked["options"]}
            text = render_jinja_template([asked["messages"]], **options)[0][0]
            answer = {"text": text}
            if len(text) > asked["characters"]:
                answer = {"refused": f"its text has {len(text)} characters"}
        except MemoryError:
            answer = {"refused": f"it takes more than {MEMORY_MIB} MiB"}
        except Exception as error:  # whatever a template's own code raises about this conversation
            answer = {"refused": (str(error) or type(error).__name__)[:_SHOWN]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory() -> None:
    import psutil

    most = psutil.Process().memory_info().vms + MEMORY_MIB * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    _main()
