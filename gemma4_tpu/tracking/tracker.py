"""The one small interface of all trackers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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
        """What came of the run, such as the fields of `Result`."""

    def close(self, status: str = "finished") -> None:
        """Ends tracking; any status but `finished`, `stopped` and `preempted` marks the run as failed."""
