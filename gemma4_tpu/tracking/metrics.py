"""`metrics.jsonl`: one JSON object per line, in the order of the updates, whatever interrupts the run.

Keys of every run:

| key | unit |
|---|---|
| `update` | updates done so far; 0 is the state before the first one |
| `loss`, `heldout_loss` | nats per target token; of another objective, per what it counts |
| `learning_rate`, `grad_norm` | the norm is global and before clipping |
| `real_tokens`, `target_tokens` | tokens in this update |
| `real_tokens_per_second`, `target_tokens_per_second` | |
| `fill` | real tokens / token slots |
| `update_seconds`, `seconds` | one update; the run so far |
| `mfu` | model FLOP/s over the chips' peak |
| `hbm_bytes`, `hbm_peak_bytes` | of the fullest device: now, and since the start |
| `usd` | the run so far |

All others are measures of the objective; those of the held-out set begin with `heldout_`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.files import from_jsonable, jsonable, write_text
from gemma4_tpu.tracking.shapes import METRICS, NUMBERED, SAMPLED, VALIDATED

log = logging.getLogger(__name__)

HELDOUT = "heldout_"
_KNOWN = (
    "update", "loss", "heldout_loss", "learning_rate", "grad_norm", "skipped_updates", "epoch", "real_tokens",
    "target_tokens", "real_tokens_per_second", "target_tokens_per_second", "fill", "update_seconds", "seconds", "mfu",
    "hbm_bytes", "hbm_peak_bytes", "usd",
)  # fmt: skip
"""Every key but an objective's."""

_SHAPES = {"metrics.jsonl": METRICS, "validation.jsonl": VALIDATED, "certificate.jsonl": SAMPLED}
"""Of the rows of the files that this module writes for others, too, by name."""


def measures_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The objective's measures in the rows, without `heldout_`, in order of first appearance."""
    return list(dict.fromkeys(key.removeprefix(HELDOUT) for row in rows for key in row if key not in _KNOWN))


class MetricsFile:
    """Append-only writer of `metrics.jsonl`. Each row is on disk (as far as the process can tell) when `log` returns.

    A resumed run continues the rows from its checkpoint, with neither gap nor duplicate. For this to hold, log all rows
    of an update before saving its checkpoint.
    """

    def __init__(self, path: Path, *, after_update: int | None = None, write: bool = True):
        """Keeps the rows there are up to `after_update` (the checkpoint's) and drops later ones.

        Args:
          path: the run folder's `metrics.jsonl`; need not exist.
          after_update: the update that the run resumes from; None: it starts afresh, and no row is kept.
          write: False on every process but the first: nothing is read or written.
        """
        self.path = path
        self._last_update = -1 if after_update is None else after_update
        self._file = None
        self.rows = 0
        """Number of rows in the file."""
        self.undone_at_seconds: float | None = None
        """`seconds` of the last row that was dropped, which the run makes again."""
        if write:
            self._drop_rows_after(self._last_update)
            self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, Any], update: int) -> None:
        """Appends one row. Several rows may share an update (training and held-out loss).

        Raises:
          ValueError: `update` is smaller than that of the row before.
        """
        if update < self._last_update:
            raise ValueError(f"metrics of update {update} after those of update {self._last_update}")
        self._last_update = update
        if self._file is not None:
            self._file.write(json.dumps(jsonable({"update": update, **metrics}), allow_nan=False) + "\n")
            self._file.flush()
            self.rows += 1

    def compare(self, rows: int | None) -> None:
        """Warns if fewer rows are left than the checkpoint counted; None: a version that did not count."""
        if rows is not None and self.rows < rows:
            log.warning(
                "%s: %d of the %d rows up to update %d are left: curves and reports of this run will have a gap; the"
                " weights are not affected", self.path, self.rows, rows, self._last_update,
            )  # fmt: skip

    def close(self) -> None:
        """Closes the file; rows are written as they come."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop_rows_after(self, update: int) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8", errors="replace")
        found = _parse(text, self.path)
        rows = [row for row in found if row["update"] <= update]
        self.rows = len(rows)
        if len(rows) < len(found):
            self.undone_at_seconds = max((row.get("seconds", 0.0) for row in found[len(rows) :]), default=None)
        kept = "".join(json.dumps(jsonable(row), allow_nan=False) + "\n" for row in rows)
        if kept != text:
            dropped = text.count("\n") - len(rows)
            log.info("%s: dropped %d rows after update %d, which run again", self.path.name, dropped, max(update, 0))
            write_text(self.path, kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a `metrics.jsonl`; a torn last line (the process was killed while writing) is left out."""
    return _parse(path.read_text(encoding="utf-8", errors="replace"), path) if path.exists() else []


def _parse(text: str, path: Path) -> list[dict[str, Any]]:
    rows, shape = [], _SHAPES.get(path.name, NUMBERED)
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = from_jsonable(json.loads(line))
            if told := shape(row, ""):
                raise ValueError(told)
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number != len(lines):  # only the last line lacks its newline
                raise UserError(f"{path}, line {number}: damaged ({error}); delete that line") from error
            log.warning("%s: the last line is incomplete and ignored", path.name)
    return rows
