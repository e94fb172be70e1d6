"""Weights & Biases behind the interface of `tracker.py`: quiet, bounded in time, offline where it has to be."""

from __future__ import annotations

import http.client
import logging
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb.sdk.lib.paths import LogicalPath

from gemma4_tpu.config.outputs import TrackerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.storage import is_remote
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.tracking.tracker import Tracker, identity, is_good

log = logging.getLogger(__name__)

INIT_TIMEOUT_SECONDS = 4.0
FINISH_TIMEOUT_SECONDS = 20.0
ANSWER_TIMEOUT_SECONDS = 10.0
_REACH_TIMEOUT_SECONDS = 3.0

Mode = Literal["online", "offline", "disabled"]


class WandbTracker(Tracker):
    """A W&B run with its files in `<run folder>/wandb`, its id and its name in `tracker.json`.

    Measured with wandb 0.31: where the server hangs or answers 500, `init` gives up after `init_timeout` and leaves its
    service holding the run id, which `teardown` frees for the offline run; 5 s in all. Asking for an answer before
    (`_answers`) makes the usual case, no network at all, quick.
    """

    def __init__(self, config: TrackerConfig, run: RunFolder, resolved: dict, name: str, job: str):
        wandb.setup(wandb.Settings(silent=True, quiet=True))
        known = identity(run, name)
        self._arguments: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": list(config.tags),
            "job_type": job,
            "name": known["name"],
            "config": resolved,
            "id": known["id"],
            "resume": "allow",
            "reinit": "create_new",  # never join a run that someone else started in this process
            "dir": str(run.path),
        }
        mode, reason = _choose_mode(config)
        try:
            self._run = self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            reason = f"can't be reached: {str(error).splitlines()[0]}"
            wandb.teardown()
            self._run = self._init("offline")
        if mode == "disabled":
            log.info("W&B is off (WANDB_MODE=disabled)")
        elif self._run.offline:
            log.info("W&B is offline (%s); upload later with: wandb sync %s", reason, os.path.dirname(self._run.dir))
        else:
            log.info("W&B: %s", self._run.url)

    def _init(self, mode: Mode) -> wandb.Run:
        settings = wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            init_timeout=INIT_TIMEOUT_SECONDS,
            finish_timeout=FINISH_TIMEOUT_SECONDS,
            # provenance.json has these, redacted; W&B would take the command line as it is
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
        )
        return wandb.init(mode=mode, settings=settings, **self._arguments)

    def log(self, metrics: dict[str, Any], update: int) -> None:
        """As `Tracker.log`."""
        self._run.log(metrics, step=update)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], update: int) -> None:
        """As `Tracker.table`."""
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        _in_time(lambda: self._run.log({name: table}, step=update))

    def artifact(self, kind: str, place: str, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """As `Tracker.artifact`."""
        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind, metadata=metadata)
        if is_remote(place):  # add_reference would open a client of the bucket, though nothing is to be looked up
            artifact.manifest.add_entry(
                ArtifactManifestEntry(path=LogicalPath(Path(place).name), ref=place, digest=place)
            )
        else:
            artifact.add_reference(Path(place).absolute().as_uri(), checksum=False)
        _in_time(lambda: self._run.log_artifact(artifact, aliases=["latest", *aliases]))

    def summary(self, values: dict[str, Any]) -> None:
        """As `Tracker.summary`."""
        self._run.summary.update(values)

    def close(self, status: str = "finished") -> None:
        """As `Tracker.close`."""
        self._run.finish(exit_code=0 if is_good(status) else 1)


def _in_time(call: Callable[[], object]) -> None:
    """Calls what asks W&B's server, which can take half a minute where the network has gone.

    Raises:
      TimeoutError: no answer within `ANSWER_TIMEOUT_SECONDS`; others: those of the call.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT_SECONDS)
    if failures:
        raise failures[0]
    if thread.is_alive():
        raise TimeoutError(f"no answer within {ANSWER_TIMEOUT_SECONDS:g} s")


def _choose_mode(config: TrackerConfig) -> tuple[Mode, str]:
    """The mode and why it is offline; online only where a key is there, so that nothing prompts."""
    mode = os.environ.get("WANDB_MODE", "online") if config.mode == "auto" else config.mode
    match mode:
        case "offline" | "disabled":
            return mode, f"mode {mode}"
        case "online":
            pass
        case _:
            raise UserError(f"W&B mode {mode}: unknown; give tracker.mode=auto, online or offline")
    try:
        problem = "" if wandb.login(prompt=False, verify=False) else "no key; give WANDB_API_KEY or run `wandb login`"
    except Exception as error:  # a key in the wrong form
        problem = str(error)
    if problem and config.mode == "online":
        raise UserError(f"tracker.mode=online: {problem}, or give tracker.mode=offline")
    url = wandb.setup().settings.base_url
    if not problem and config.mode == "auto" and not _answers(url):
        problem = f"{url} doesn't answer"
    return ("offline" if problem else "online"), problem


def _answers(url: str) -> bool:
    """Whether an HTTP server (or a proxy to it) answers at `url` in time, looking up its name included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_REACH_TIMEOUT_SECONDS).close()
            answered.set()
        except urllib.error.HTTPError:  # an answer all the same
            answered.set()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", error), ssl.SSLError):  # W&B brings its own certificate settings
                answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a timeout of the request would not cover a slow name server
    asking.start()
    asking.join(_REACH_TIMEOUT_SECONDS)
    return answered.is_set()
