"""Trackio behind the interface of `tracker.py`: in the run folder, or where Trackio's own variables say."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from gemma4_tpu.config.outputs import TrackerConfig
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.tracking.tracker import Tracker, identity

log = logging.getLogger(__name__)


class TrackioTracker(Tracker):
    """A run of the project `tracker.project`, in TRACKIO_DIR, or at TRACKIO_SERVER_URL or TRACKIO_SPACE_ID.

    Trackio knows a run by its name, so the name ends with the id that `tracker.json` keeps.
    """

    def __init__(self, config: TrackerConfig, run: RunFolder, resolved: dict, name: str, job: str):
        os.environ.setdefault("TRACKIO_DIR", str(run.path / "trackio"))  # read when it is imported
        import trackio

        self._table, self._finish, known = trackio.Table, trackio.finish, identity(run, name)
        self._artifacts: list[tuple[str, str, str]] = []
        self._last = 0
        with _quiet():
            self._run = trackio.init(
                project=config.project, name=f"{known['name']} {known['id']}", group=config.group, resume="allow",
                config={**resolved, "job": job, "tags": list(config.tags)}, embed=False, auto_log_cpu=False,
                auto_log_gpu=False,
            )  # fmt: skip
        log.info("Trackio: TRACKIO_DIR=%s trackio show --project %s", trackio.TRACKIO_DIR, config.project)

    def log(self, metrics: dict[str, Any], update: int) -> None:
        """As `Tracker.log`."""
        self._run.log(metrics, step=update)
        self._last = update

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], update: int) -> None:
        """As `Tracker.table`."""
        self._run.log({name: self._table(columns=list(columns), data=[list(row) for row in rows])}, step=update)

    def artifact(self, kind: str, place: str, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """As `Tracker.artifact`: a table of places, since Trackio's references don't know gs://."""
        self._artifacts.append((kind, place, ", ".join(aliases)))
        self.table("artifacts", ["kind", "place", "aliases"], self._artifacts, self._last)

    def summary(self, values: dict[str, Any]) -> None:
        """As `Tracker.summary`."""
        rows = [(key, value) for key, value in values.items() if value is not None]
        self.table("result", ["key", "value"], rows, self._last)

    def close(self, status: str = "finished") -> None:
        """As `Tracker.close`."""
        with _quiet():
            self._finish()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Trackio prints what it does."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
