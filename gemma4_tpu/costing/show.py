"""`python -m gemma4_tpu.report cost …`, `… plausibility …` and `… prices`: reads, then writes or prints the report."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.config.tasks import ReportRoot
from gemma4_tpu.costing.cost import Prices
from gemma4_tpu.costing.figures import MEASURED
from gemma4_tpu.costing.plausibility import IMPOSSIBLE, judge
from gemma4_tpu.costing.price_list import price_list
from gemma4_tpu.costing.read import read
from gemma4_tpu.costing.report import cost_report, plausibility_report
from gemma4_tpu.tracking.files import write_text

MEASURED_WRONG = 1
"""Exit code: a figure that is said to be measured here lies above its ceiling."""
_COST_KEYS = ("serving_hours", "serving_slices", "prices", "spot_prices", "out")


def show_costs(root: ReportRoot) -> int:
    """Costs of `root.cost`. Returns 0."""
    figures = read(root.cost)
    changed = {key: getattr(root, key) for key in _COST_KEYS if getattr(root, key) != getattr(ReportRoot(), key)}
    text = cost_report(
        figures, Prices(on_demand=root.prices, spot=root.spot_prices), root.serving_hours,
        slices=root.serving_slices, command=_command("cost", root.cost, changed),
    )  # fmt: skip
    _deliver(text, root.out)
    return 0


def show_plausibility(places: Sequence[str], out: str | None) -> int:
    """Throughputs and latencies of all places beside their ceilings. Returns `MEASURED_WRONG` or 0."""
    figures = read(places)
    _deliver(plausibility_report(figures, command=_command("plausibility", places, {"out": out} if out else {})), out)
    judged, _ = judge(figures)
    wrong = any(one.verdict == IMPOSSIBLE and one.figure.label == MEASURED for one in judged)
    return MEASURED_WRONG if wrong else 0


def show_price_list() -> int:
    """Every price that is built in, and how old it is. Returns 0."""
    print(price_list(datetime.date.today()), end="")
    return 0


def _deliver(text: str, out: str | None) -> None:
    """To the file, else to the terminal."""
    if out is None:
        print(text, end="")
        return
    write_text(Path(out), text)
    print(f"written: {out}")


def _command(subject: str, places: Sequence[str], changed: Mapping[str, Any]) -> str:
    """The command line that asks for the same again."""
    words = [f"{key}={_written(value)}" for key, value in changed.items()]
    return shlex.join(["python", "-m", "gemma4_tpu.report", subject, *places, *words])


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {each:g}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value) + "]"
    return str(value)
