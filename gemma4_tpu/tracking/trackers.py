"""Where metrics go besides `metrics.jsonl`: nowhere, W&B, MLflow, Trackio, TensorBoard or a file of JSON lines.

`metrics.jsonl` is the record; a tracker is a convenience that can never stop or delay a run for long.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from gemma4_tpu.config.limits import CHOICES
from gemma4_tpu.config.outputs import TrackerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.markdown import table
from gemma4_tpu.redact import redact
from gemma4_tpu.tracking.differences import is_among
from gemma4_tpu.tracking.files import jsonable, plain
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.tracking.tracker import PACKAGES, Tracker

log = logging.getLogger(__name__)

_DEFAULTS = {
    "WANDB_ERROR_REPORTING": "false",  # crash reports, which can also delay the exit
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # else a line for each table of a new database
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # with the next: a server that has gone costs seconds, not many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
"""What libraries read from the environment when they are imported, unless the user has set it."""
_EXTRAS = ("table", "artifact")
_NAME_CHARACTERS = 128  # what W&B takes
_NOT_IN_NAMES = ("name", "run_dir", "tracker", "preview", "distributed", "checkpoint", "trainer.compile_cache")


def make_tracker(
    config: TrackerConfig, run: RunFolder, resolved_config: dict[str, Any], *, name: str, job: str = "train"
) -> Tracker:
    """Builds the tracker that `config.kind` names; one that keeps nothing where `run` isn't written by this process.

    Args:
      config: the tracker's group.
      run: where the tracker's own files go. The run's id and name there are kept in it too, so that a resumed run
        resumes under them.
      resolved_config: the whole configuration as plain values, shown with the run.
      name: what the tracker calls the run; see `run_name`.
      job: what kind of run it is, `train` or `merge`.

    Raises:
      UserError: unknown kind, library not installed, or `tracker.mode=online` without a key.
    """
    if config.kind not in CHOICES["tracker.kind"]:
        raise UserError(f"tracker.kind={config.kind}: unknown; give {', '.join(CHOICES['tracker.kind'])}")
    if config.kind == "none" or not run.write:
        return Tracker()
    config, resolved_config, name = TrackerConfig(**jsonable(asdict(config))), jsonable(resolved_config), redact(name)
    try:
        return _Guarded(_tracker(config.kind)(config, run, resolved_config, name, job), config.kind)
    except ImportError as error:
        remedy = f"pip install {PACKAGES[config.kind][1]}, or give tracker=none"
        raise UserError(f"tracker.kind={config.kind}: {error}; {remedy}") from error
    except UserError:
        raise
    except Exception as error:
        _warn(f"{config.kind} failed", error)
        return Tracker()


def _tracker(kind: str) -> Callable[[TrackerConfig, RunFolder, dict[str, Any], str, str], Tracker]:
    """Libraries are imported where they are used: their import takes seconds."""
    for variable, value in _DEFAULTS.items():
        os.environ.setdefault(variable, value)
    match kind:
        case "wandb":
            from gemma4_tpu.tracking.wandb_tracker import WandbTracker

            return WandbTracker
        case "mlflow":
            from gemma4_tpu.tracking.mlflow_tracker import MlflowTracker

            return MlflowTracker
        case "trackio":
            from gemma4_tpu.tracking.trackio_tracker import TrackioTracker

            return TrackioTracker
    return _TensorBoard if kind == "tensorboard" else _JsonLines


def run_name(name: str, overrides: Sequence[str]) -> str:
    """What tells a run from the others of a sweep: its overrides, as `lora.rank=16 trainer.seed=1`.

    Overrides that change nothing about the training are left out; without any that do, it is `name`, the configured
    one, which also stands first where it was given.
    """
    given = [re.sub(r"\\(.)", r"\1", word.lstrip("+")) for word in overrides]  # without what Hydra's grammar escapes
    kept = [word for word in given if not is_among(word.partition("=")[0], _NOT_IN_NAMES)]
    if not kept or any(word.startswith("name=") for word in given):
        kept.insert(0, name)
    text = " ".join(kept)
    return text if len(text) <= _NAME_CHARACTERS else text[: _NAME_CHARACTERS - 1] + "…"


class _Guarded(Tracker):
    """Lets the run go on when its tracker fails: warns once, then keeps nothing more.

    Tables and artifacts are less robust than metrics (W&B asks its server before it takes one): where they fail, the
    tracker goes on without them.
    """

    def __init__(self, inner: Tracker, kind: str):
        self._inner = inner
        self._kind = kind
        self._dropped: tuple[str, ...] = ()

    def log(self, metrics, update):
        self._call("log", plain(metrics), update)

    def table(self, name, columns, rows, update):
        self._call("table", name, columns, plain(rows), update)

    def artifact(self, kind, place, aliases, metadata):
        self._call("artifact", kind, redact(place), aliases, jsonable(metadata))

    def summary(self, values):
        self._call("summary", plain(values))

    def close(self, status="finished"):
        self._call("close", status)

    def _call(self, method: str, *arguments: Any) -> None:
        if method in self._dropped:
            return
        try:
            getattr(self._inner, method)(*arguments)
        except Exception as error:
            if method in _EXTRAS:
                self._dropped = _EXTRAS
                _warn(f"{self._kind} takes no more samples and artifacts", error)
            else:
                self._inner = Tracker()
                _warn(f"{self._kind} failed", error)


def _warn(what: str, error: Exception) -> None:
    reason = (str(error).splitlines() or [""])[0]
    log.warning(
        "tracker %s (%s: %s); the run continues, and its folder has everything", what, type(error).__name__, reason
    )


class _TensorBoard(Tracker):
    """Event files in `<run folder>/tensorboard`, written without TensorFlow."""

    def __init__(self, config: TrackerConfig, run: RunFolder, resolved: dict[str, Any], name: str, job: str):
        from tensorboardX import SummaryWriter

        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # a line per NaN, without its name
        folder = run.path / "tensorboard"
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        self._artifacts: list[tuple[str, str, str]] = []
        log.info("TensorBoard: tensorboard --logdir %s", folder)

    def log(self, metrics, update):
        for key, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, update)

    def table(self, name, columns, rows, update):
        self._writer.add_text(name, "\n".join(table(columns, rows)).rstrip(), update)

    def artifact(self, kind, place, aliases, metadata):
        self._artifacts.append((kind, place, ", ".join(aliases)))
        self.table("artifacts", ["kind", "place", "aliases"], self._artifacts, 0)

    def summary(self, values):
        rows = [(key, value) for key, value in values.items() if value is not None]
        self.table("result", ["key", "value"], rows, 0)

    def close(self, status="finished"):
        self._writer.close()


class _JsonLines(Tracker):
    """`tracker.jsonl` in the run folder: all that a tracker is told, one JSON object per line, for other programs to
    follow. Each has `event` (`start`, `metrics`, `table`, `artifact`, `summary`, `close`).
    """

    def __init__(self, config: TrackerConfig, run: RunFolder, resolved: dict[str, Any], name: str, job: str):
        self._file = (run.path / "tracker.jsonl").open("a", encoding="utf-8")
        self._write("start", name=name, config=resolved)

    def log(self, metrics, update):
        self._write("metrics", update=update, **metrics)

    def table(self, name, columns, rows, update):
        self._write("table", update=update, name=name, columns=columns, rows=rows)

    def artifact(self, kind, place, aliases, metadata):
        self._write("artifact", kind=kind, place=place, aliases=aliases, metadata=metadata)

    def summary(self, values):
        self._write("summary", **values)

    def close(self, status="finished"):
        self._write("close", status=status)
        self._file.close()

    def _write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps(jsonable({"event": event, **values}), allow_nan=False) + "\n")
        self._file.flush()
