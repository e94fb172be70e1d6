"""The one small interface of all trackers, and what they call a run."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from gemma4_tpu.tracking.files import read_json, write_json
from gemma4_tpu.tracking.run import RunFolder

PACKAGES = {
    "wandb": ("wandb", "wandb"), "tensorboard": ("tensorboardX", "tensorboardX"),
    "mlflow": ("mlflow", "'gemma4-tpu[mlflow]'"), "trackio": ("trackio", "'gemma4-tpu[trackio]'"),
}  # fmt: skip
"""Kind of tracker → the module that it imports, and what pip installs for it."""


class Tracker:
    """Keeps nothing (`tracker=none`), and is the interface of the others."""

    def log(self, metrics: dict[str, Any], update: int) -> None:
        """Metrics of one update, under the keys of `metrics.jsonl`."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], update: int) -> None:
        """A table at one update, such as held-out samples."""

    def artifact(self, kind: str, place: str, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """A folder that came of the run, local or gs://, by reference: nothing is copied.

        Args:
          kind: `checkpoint`, `merged` or `adapter`.
          place: the folder.
          aliases: what it is called besides, such as `best`.
          metadata: what there is to know about it, plain values.
        """

    def summary(self, values: dict[str, Any]) -> None:
        """The run's result, such as the fields of `Result`."""

    def close(self, status: str = "finished") -> None:
        """Ends tracking; a status that is not `is_good` marks the run as failed."""


def is_good(status: str) -> bool:
    """Whether a run with this status (`Result.status`) went as it should."""
    return status in ("finished", "stopped", "preempted")


def identity(run: RunFolder, name: str) -> dict[str, str]:
    """`id` and `name` of the run at its tracker: those in the run folder, where it is resumed, else new ones, which are
    kept there, in `tracker.json`.

    The folder's small files reach a bucket before each checkpoint does, so the id is there wherever the run resumes.
    """
    path = run.path / "tracker.json"
    if path.exists():
        known = read_json(path)
        return {"id": known.get("wandb_id"), "name": name, **known}  # what it was called while W&B alone had one
    new = {"id": secrets.token_hex(4), "name": name}
    write_json(path, new)
    return new
