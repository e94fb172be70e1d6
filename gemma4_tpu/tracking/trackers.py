"""Where metrics go besides `metrics.jsonl`: nowhere, Weights & Biases, or TensorBoard, behind one small interface.

`metrics.jsonl` is the record; a tracker is a convenience that can never stop or delay a run for long.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from gemma4_tpu.config.schema import TrackerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.files import from_jsonable, jsonable
from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)

_PACKAGES = {"none": "", "wandb": "wandb", "tensorboard": "tensorboardX"}


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
    if config.kind not in _PACKAGES:
        raise UserError(f"tracker.kind={config.kind}: unknown; give {', '.join(_PACKAGES)}")
    if config.kind == "none" or not run.write:
        return Tracker()
    try:
        if config.kind == "tensorboard":
            return _Guarded(_TensorBoard(run), config.kind)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's crash reports, which can also delay the exit
        from gemma4_tpu.tracking.wandb_tracker import WandbTracker

        return _Guarded(WandbTracker(config, run, resolved_config, name, resume_id), config.kind)
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[config.kind]}, or give tracker=none"
        raise UserError(f"tracker.kind={config.kind}: {error}; {remedy}") from error
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


class _TensorBoard(Tracker):
    """Event files in `<run folder>/tensorboard`, written without TensorFlow."""

    def __init__(self, run: RunFolder):
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
