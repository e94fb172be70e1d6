"""Where metrics go besides `metrics.jsonl`: nowhere, Weights & Biases, or TensorBoard, behind one small interface.

`metrics.jsonl` is the record; a tracker is a convenience that can never stop or delay a run for long.
"""

from __future__ import annotations

import logging
import os
import secrets
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from gemma4_tpu.config.schema import TrackerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.files import from_jsonable, jsonable, read_json, write_json
from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)


class Tracker:
    """Keeps nothing (`tracker=none`), and is the interface of the others."""

    def log(self, metrics: dict[str, Any], update: int) -> None:
        """Metrics of one update, under the keys of `metrics.jsonl`."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], update: int) -> None:
        """A table at one update, such as held-out samples."""

    def summary(self, values: dict[str, Any]) -> None:
        """What came of the run, such as the fields of `Result`."""

    def close(self, status: str = "finished") -> None:
        """Ends tracking; any status but `finished` and `preempted` marks the run as failed."""


def make_tracker(
    config: TrackerConfig, run: RunFolder, resolved_config: dict[str, Any], *, name: str, resume_id: str | None = None
) -> Tracker:
    """Builds the tracker that `config.kind` names; one that keeps nothing where `run` isn't written by this process.

    Args:
      config: the tracker's group.
      run: where W&B's or TensorBoard's own files go.
      resolved_config: the whole configuration as plain values, shown beside the run.
      name: what the tracker calls the run.
      resume_id: W&B id of the run to continue; None: the one in the run folder, else a new one, which is kept there.

    Raises:
      UserError: unknown kind, library not installed, or `tracker.mode=online` without a key.
    """
    kinds = {"none": None, "wandb": _Wandb, "tensorboard": _TensorBoard}
    if config.kind not in kinds:
        raise UserError(f"tracker.kind={config.kind}: unknown; give one of {', '.join(kinds)}")
    if config.kind == "none" or not run.write:
        return Tracker()
    try:
        return _Guarded(kinds[config.kind](config, run, resolved_config, name, resume_id), config.kind)
    except ImportError as error:
        package = {"wandb": "wandb", "tensorboard": "tensorboardX"}[config.kind]
        raise UserError(
            f"tracker.kind={config.kind}: {error}; `pip install {package}`, or give tracker=none"
        ) from error
    except UserError:
        raise
    except Exception as error:
        _warn(config.kind, error)
        return Tracker()


class _Guarded(Tracker):
    """Lets the run go on when its tracker fails: warns once, then keeps nothing more."""

    def __init__(self, inner: Tracker, kind: str):
        self._inner = inner
        self._kind = kind

    def log(self, metrics, update):
        self._call("log", from_jsonable(jsonable(metrics)), update)

    def table(self, name, columns, rows, update):
        self._call("table", name, columns, rows, update)

    def summary(self, values):
        self._call("summary", from_jsonable(jsonable(values)))

    def close(self, status="finished"):
        self._call("close", status)

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._inner, method)(*arguments)
        except Exception as error:
            _warn(self._kind, error)
            self._inner = Tracker()


def _warn(kind: str, error: Exception) -> None:
    name = type(error).__name__
    log.warning("tracker %s failed (%s: %s); the run goes on, metrics.jsonl has it all", kind, name, error)


class _Wandb(Tracker):
    """A W&B run, online or offline, with its files in `<run folder>/wandb` and its id in `tracker.json`.

    Measured with wandb 0.31: where the server hangs or answers 500, `init` gives up after `init_timeout` and leaves its
    service holding the run id, which `teardown` frees for the offline run; 7 s in all. Asking for an answer before
    (`_answers`) makes the usual case, no network at all, quick.
    """

    INIT_TIMEOUT_SECONDS = 5.0
    FINISH_TIMEOUT_SECONDS = 20.0

    def __init__(self, config: TrackerConfig, run: RunFolder, resolved: dict, name: str, resume_id: str | None):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own crash reports; they can also delay exit
        import wandb

        self._wandb = wandb
        wandb.setup(wandb.Settings(silent=True, quiet=True))
        self._arguments = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": list(config.tags),
            "name": name,
            "config": jsonable(resolved),
            "id": _wandb_id(run, resume_id),
            "resume": "allow",
            "reinit": "create_new",  # never join a run that someone else started in this process
            "dir": str(run.path),
        }
        mode, reason = _wandb_mode(config, wandb)
        try:
            self._run = self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            reason = f"can't be reached: {str(error).splitlines()[0]}"
            wandb.teardown()
            self._run = self._init("offline")
        if self._run.offline:
            log.info("W&B is offline (%s); upload later with: wandb sync %s", reason, os.path.dirname(self._run.dir))
        else:
            log.info("W&B: %s", self._run.url)

    def _init(self, mode: str):
        settings = self._wandb.Settings(
            silent=True,
            quiet=True,
            console="off",
            init_timeout=self.INIT_TIMEOUT_SECONDS,
            finish_timeout=self.FINISH_TIMEOUT_SECONDS,
            # provenance.json has these, redacted; W&B would take the command line as it is
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
        )
        return self._wandb.init(mode=mode, settings=settings, **self._arguments)

    def log(self, metrics, update):
        self._run.log(metrics, step=update)

    def table(self, name, columns, rows, update):
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({name: table}, step=update)

    def summary(self, values):
        self._run.summary.update(values)

    def close(self, status="finished"):
        self._run.finish(exit_code=0 if status in ("finished", "preempted") else 1)


def _wandb_mode(config: TrackerConfig, wandb) -> tuple[str, str]:
    """`online`, `offline` or (by WANDB_MODE) `disabled`, and why; online only with a key, so that nothing prompts."""
    mode = os.environ.get("WANDB_MODE", "online") if config.mode == "auto" else config.mode
    if mode not in ("online", "offline", "disabled"):
        raise UserError(f"tracker.mode={mode}: unknown; give auto, online or offline")
    if mode != "online":
        return mode, "as configured"
    try:
        has_key, problem = wandb.login(prompt=False, verify=False), "no key: give WANDB_API_KEY or run `wandb login`"
    except Exception as error:  # a key in the wrong form
        has_key, problem = False, str(error)
    if config.mode == "online":
        if has_key:
            return "online", ""
        raise UserError(f"tracker.mode=online: {problem}, or tracker.mode=offline")
    if has_key and not _answers(url := wandb.setup().settings.base_url):
        has_key, problem = False, f"{url} doesn't answer"
    return ("online" if has_key else "offline"), problem


def _answers(url: str, timeout_seconds: float = 3.0) -> bool:
    """Whether an HTTP server (or a proxy to it) answers at `url` in this time, looking up its name included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_seconds).close()
            answered.set()
        except urllib.error.HTTPError:  # an answer all the same
            answered.set()
        except OSError as error:
            if isinstance(getattr(error, "reason", error), ssl.SSLError):  # W&B brings its own certificate settings
                answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_seconds)
    return answered.is_set()


def _wandb_id(run: RunFolder, resume_id: str | None) -> str:
    path = run.path / "tracker.json"
    if resume_id is None and path.exists():
        return read_json(path)["wandb_id"]
    run_id = resume_id or secrets.token_hex(4)
    write_json(path, {"wandb_id": run_id})
    return run_id


class _TensorBoard(Tracker):
    """Event files in `<run folder>/tensorboard`, written without TensorFlow."""

    def __init__(self, config: TrackerConfig, run: RunFolder, resolved: dict, name: str, resume_id: str | None):
        from tensorboardX import SummaryWriter

        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a line per NaN, without its name
        folder = run.path / "tensorboard"
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        log.info("TensorBoard: tensorboard --logdir %s", folder)

    def log(self, metrics, update):
        for key, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, update)

    def table(self, name, columns, rows, update):
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in [columns, ["---"] * len(columns), *rows]]
        self._writer.add_text(name, "\n".join(lines), update)

    def summary(self, values):
        rows = [(key, value) for key, value in values.items() if value is not None]
        self.table("result", ["key", "value"], rows, 0)

    def close(self, status="finished"):
        self._writer.close()


def _cell(value: Any) -> str:
    """A value inside a Markdown table: one line, bars escaped."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")
