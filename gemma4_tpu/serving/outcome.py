"""Common to both kinds of server: the result, stopping on request, and the check that it serves the trained model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gemma4_tpu.checkpoint_folder import PROBE_NAME
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import TERMINATED, TERMINATING, first_line
from gemma4_tpu.serving.checks import ServeChecked, url_of
from gemma4_tpu.serving.command import model_name
from gemma4_tpu.serving.probe import probe
from gemma4_tpu.serving.signals import Signals, Stopped
from gemma4_tpu.tracking.progress import format_seconds

log = logging.getLogger(__name__)

KEY = "VLLM_API_KEY"


@dataclass(kw_only=True)
class ServerOutcome:
    """Contents of `result.json`."""

    status: str = "failed"
    """`stopped` (on request, after it had answered), `interrupted` (before) or `failed`."""
    endpoint: str
    model: str
    folder: str
    slice: str
    ready_seconds: float | None = None
    """From the start to the first answer."""
    served_seconds: float | None = None
    probe: dict[str, Any] | None = None
    """With adapters: one for each, by name."""
    error: str | None = None

    @staticmethod
    def about(serving: ServingConfig, checked: ServeChecked) -> dict[str, Any]:
        """The fields that are known before the start."""
        return {
            "endpoint": f"{url_of(serving)}/v1", "model": model_name(serving, checked), "folder": str(checked.model),
            "slice": serving.slice,
        }  # fmt: skip

    def announce(self, ready_seconds: float, stopping: str) -> None:
        """Logs that the server answers. `stopping`: the effect of Ctrl-C."""
        self.ready_seconds = ready_seconds
        log.info("ready after %s; Ctrl-C %s", format_seconds(ready_seconds), stopping)
        print(f"endpoint: {self.endpoint}\nmodel: {self.model}", flush=True)


def until_stopped(outcome: ServerOutcome, serve: Callable[[Signals], None], stopped: str) -> int:
    """Runs `serve` until a signal ends it; returns the exit code: 0 if it had answered, else 128 + signal.

    Args:
      outcome: receives `status` and `error`; its `ready_seconds` shows whether the server has answered.
      serve: ends by a signal or by an error, which is passed on.
      stopped: the state of the server afterwards, in words.
    """
    with Signals() as signals:
        try:
            serve(signals)
        except Stopped as signal:
            answered = outcome.ready_seconds is not None
            outcome.status = "stopped" if answered else "interrupted"
            log.info("%s: %s", signal, stopped)
            stopped_code = TERMINATED if signal.number in TERMINATING else 128 + signal.number
            return 0 if answered else stopped_code
        except Exception as error:
            outcome.error = first_line(error)
            raise
    raise AssertionError("a server ends by a signal or an error")


def client_of(serving: ServingConfig) -> httpx.Client:
    """A client of the server on this machine: plain HTTP, no proxies, no certificates."""
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
    return httpx.Client(base_url=url_of(serving), headers=headers, trust_env=False, verify=False)


def confirm(client: httpx.Client, serving: ServingConfig, checked: ServeChecked, outcome: ServerOutcome) -> None:
    """Verifies that it serves the trained model, if the folder contains prompts for that.

    Raises:
      UserError: it answers like the base model, or not at all.
    """
    if not serving.probe:
        log.warning("serving.probe=false: not verified that this is the trained model")
        return
    if not checked.adapters:
        outcome.probe = _confirmed(client, outcome.model, checked.model)
        return
    outcome.probe = {each.name: _confirmed(client, each.name, each.folder) for each in checked.adapters}


def _confirmed(client: httpx.Client, name: str, folder: Path) -> dict[str, Any] | None:
    """The server's answers as `name`; None if the folder contains no prompts."""
    found = probe(client, name, folder)
    if found is None:
        log.warning(
            "%s contains no %s with prompts on which trained and base model differ, so it was not verified which"
            " of them it serves; merge with verify=true (export=merged or both) stores some", folder, PROBE_NAME,
        )  # fmt: skip
        return None
    say = log.info if found.as_merged > found.prompts / 2 else log.warning
    hint = "" if say == log.info else ": quantisation can cause that, or it is another model"
    say("%s: the server %s%s", name, found.told, hint)
    return found.plain()
