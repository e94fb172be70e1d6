"""What a run tells while it goes on, and whom: `metrics.jsonl`, the tracker, a person, the record that it repeats."""

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
    """Takes the metrics of each update; a context manager that closes what it told them to."""

    def __init__(
        self, folder: RunFolder, tracker: Tracker, replay: Replay | None, *, updates: int, resume_from: int | None,
        beside_loss: str | None = None,
    ):  # fmt: skip
        """Of a run of so many `updates`; rows that were reported after the update `resume_from` are dropped.

        `beside_loss`: a measure for the line of progress.
        """
        self.tracker = tracker
        self.progress = Progress(updates, first_update=resume_from or 0, show=folder.write, beside_loss=beside_loss)
        """A context manager too: on a terminal the bar is there while it is open."""
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
        """What came of the run, and the checkpoints that are left of it."""
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
