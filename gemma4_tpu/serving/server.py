"""One vLLM server: starts it, follows it until it answers, verifies its model, stops it."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.serving.checks import ServeChecked
from gemma4_tpu.serving.command import cache_folder
from gemma4_tpu.serving.log import ServerLog, Stages
from gemma4_tpu.serving.memory import MemoryEstimate
from gemma4_tpu.serving.outcome import ServerOutcome, client_of, confirm, until_stopped
from gemma4_tpu.serving.runners import runner_of
from gemma4_tpu.serving.signals import Signals, Stopped
from gemma4_tpu.serving.troubles import Trouble, trouble_in
from gemma4_tpu.tracking.logs import console
from gemma4_tpu.tracking.progress import format_seconds

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
LINE_SECONDS = 30.0
"""Interval between progress lines of a starting server, without a terminal."""
TROUBLE_SECONDS = 15.0
"""A server that has printed a known error is abandoned after this time, if it has neither ended nor answered."""
STOP_SECONDS = 30
"""Time for a server to end before it is killed."""


class ServerFailed(UserError):
    """The server did not start, or ended by itself."""


@dataclass(kw_only=True)
class VllmOutcome(ServerOutcome):
    """Contents of `result.json` for a vLLM server."""

    runner: str
    image: str | None
    """None: no container."""
    command: str
    memory: MemoryEstimate
    image_digest: str | None = None
    """`<name>@sha256:…`; None: the image was built here."""
    version: str | None = None
    """vLLM's version, as reported by the server."""


class Server:
    """Runs one server from start to end."""

    def __init__(self, serving: ServingConfig, checked: ServeChecked, memory: MemoryEstimate, log_path: Path):
        self._serving, self._checked, self._log_path = serving, checked, log_path
        self._runner = runner_of(serving, checked)
        self._client = client_of(serving)
        self._stop_seconds = STOP_SECONDS
        self.outcome = VllmOutcome(
            **ServerOutcome.about(serving, checked), runner=serving.runner, memory=memory,
            image=serving.image if serving.runner == "docker" else None, command=self._runner.command,
        )  # fmt: skip

    def run(self) -> int:
        """Returns 0 if stopped after it answered, 130 or 143 (128 + signal) if stopped before.

        Raises:
          UserError: it did not start, does not serve the trained model, or ended by itself.
        """
        with self._client:
            return until_stopped(self.outcome, self._serve, self._runner.stopped)

    def _serve(self, signals: Signals) -> None:
        self.outcome.image_digest = self._runner.prepare()
        self._make_cache()
        with ExitStack() as stack:
            with signals.held():
                what = self._runner.start()
                stack.callback(self._remove, signals)
            started = time.monotonic()
            follower = stack.enter_context(ServerLog(self._runner.follow(), self._log_path))
            stack.callback(self._stop)
            log.info("%s started; its log: %s", what, self._log_path)
            self._wait_until_ready(follower)
            ready = time.monotonic()
            self.outcome.version = self._version()
            confirm(self._client, self._serving, self._checked, self.outcome)
            self.outcome.announce(ready - started, self._runner.stopping)
            for adapter in self._checked.adapters:
                print(f"adapter: {adapter.name}", flush=True)
            try:
                self._wait_until_end(follower)
            finally:
                self.outcome.served_seconds = time.monotonic() - ready

    def _make_cache(self) -> None:
        if cache := cache_folder(self._serving):
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"serving.compile_cache={cache}: can't make this folder ({error.strerror})") from None

    def _wait_until_ready(self, follower: ServerLog) -> None:
        serving, stages = self._serving, Stages()
        trouble: tuple[float, Trouble] | None = None
        started = line_at = time.monotonic()
        with self._progress() as status:
            while True:
                for line in follower.lines(POLL_SECONDS):
                    if stages.see(line) and status is None:
                        line_at = time.monotonic()
                        log.info("%s", stages.told)
                    if trouble is None and (found := trouble_in(line)):
                        trouble = time.monotonic(), found
                        log.warning("%s", found.line)
                waited = time.monotonic() - started
                if status is not None:
                    status.update(f"{stages.told}, {format_seconds(waited)}")
                elif time.monotonic() - line_at > LINE_SECONDS:
                    line_at = time.monotonic()
                    log.info("%s, %s", stages.told, format_seconds(waited))
                if follower.ended:
                    raise self._ended(follower, trouble[1] if trouble else None, "did not start")
                if self._answers():
                    return
                if trouble and time.monotonic() - trouble[0] > TROUBLE_SECONDS:
                    raise self._failure("will not start", follower, trouble[1])
                if waited > serving.ready_timeout_seconds:
                    raise self._failure(
                        f"does not answer after {format_seconds(waited)} ({stages.told}); allow more time with"
                        " serving.ready_timeout_seconds, and keep serving.compile_cache", follower, None,
                    )  # fmt: skip

    def _progress(self) -> AbstractContextManager[Any]:
        return console().status("starting") if console().is_terminal else nullcontext()

    def _answers(self) -> bool:
        """Whether this very server is up: healthy, and listing its model."""
        try:
            if self._client.get("/health").status_code != 200:
                return False
            models = self._client.get("/v1/models").json()
            return self.outcome.model in [model["id"] for model in models["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return False

    def _version(self) -> str | None:
        """The version of vLLM; None if the server does not report it."""
        try:
            return self._client.get("/version").json()["version"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    def _wait_until_end(self, follower: ServerLog) -> None:
        seen: set[str] = set()
        trouble = None
        while not follower.ended:
            for line in follower.lines(1.0):
                found = trouble_in(line)
                if found and found.remedy not in seen:
                    seen.add(found.remedy)
                    trouble = found
                    log.warning("%s: %s", found.line, found.remedy)
        raise self._ended(follower, trouble, "ended by itself")

    def _ended(self, follower: ServerLog, trouble: Trouble | None, what: str) -> ServerFailed:
        state = self._runner.state()
        if state.running:  # its log was cut off
            return self._failure("can no longer be followed: its log ended", follower, trouble)
        # It has ended, so there is nothing to stop.
        self._stop_seconds = 0
        if state.out_of_memory or state.exit_code == 137:
            trouble = trouble or Trouble(
                f"exit code {state.exit_code}", "host memory is exhausted; the model is loaded through it"
            )
        return self._failure(f"{what}: exit code {state.exit_code}", follower, trouble)

    def _failure(self, what: str, follower: ServerLog, trouble: Trouble | None) -> ServerFailed:
        told = f"the server {what}"
        if trouble:
            return ServerFailed(f"{told}\n  {trouble.line}\n{trouble.remedy}\n(its log: {self._log_path})")
        if follower.raised:
            raised = "\n  ".join(follower.raised)
            return ServerFailed(f"{told}: {raised}\n(its log: {self._log_path})")
        last = "".join(f"\n  {line}" for line in follower.last) or "\n  (it printed nothing)"
        return ServerFailed(f"{told}; its last lines:{last}\n(its log: {self._log_path})")

    def _stop(self) -> None:
        """Lets the server end by itself; a second signal ends it at once."""
        if not self._stop_seconds:
            return
        try:
            log.info("stopping the server (at most %d s; Ctrl-C again to kill it)", self._stop_seconds)
            self._runner.stop(self._stop_seconds)
        except Stopped:
            self._runner.remove()

    def _remove(self, signals: Signals) -> None:
        with signals.held(drop=True):
            self._runner.remove()
