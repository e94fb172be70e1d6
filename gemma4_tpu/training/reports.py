"""Where a run reports its progress: `metrics.jsonl`, the tracker, a person, and the record that it repeats."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemma4_tpu.tracking.metrics import MetricsFile
from gemma4_tpu.tracking.progress import Progress
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.tracking.tracker import Tracker

if TYPE_CHECKING:
    from gemma4_tpu.training.checkpoint import Checkpoints
    from gemma4_tpu.training.replay import Replay


class Reports:
    """Receives the metrics of each update; as a context manager, it closes their destinations."""

    def __init__(
        self, folder: RunFolder, tracker: Tracker, replay: Replay | None, *, updates: int, resume_from: int | None,
        beside_loss: str | None = None,
    ):  # fmt: skip
        """Prepares reports of a run of `updates` updates; drops rows reported after the update `resume_from`.

        `beside_loss`: another measure for progress lines.
        """
        self.tracker = tracker
        self.progress = Progress(updates, first_update=resume_from or 0, show=folder.write, beside_loss=beside_loss)
        """Also a context manager: on a terminal, the bar is shown while it is open."""
        self.history = MetricsFile(folder.metrics_path, after_update=resume_from, write=folder.write)
        self._replay = replay
        self._status = "failed"

    def __call__(self, row: dict[str, Any], update: int) -> None:
        """The metrics of an update, under the keys of `metrics.jsonl`."""
        self.history.log(row, update)
        self.tracker.log(row, update)
        self.progress.log(row, update)
        if self._replay:
            self._replay.watch(row, update)

    def finish(self, result: Result, checkpoints: Checkpoints) -> None:
        """Reports the run's result, and its remaining checkpoints."""
        if self._replay and result.status == "finished":
            self._replay.finish()
        for update in checkpoints.updates:
            best = ["best"] * (update == result.heldout_update_best)
            place = f"{checkpoints.folder}/{update}"
            self.tracker.artifact("checkpoint", place, [f"update-{update}", *best], {"update": update})
        self.tracker.summary(asdict(result))
        self._status = result.status

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *error: object) -> None:
        self.tracker.close(self._status)
        self.history.close()
