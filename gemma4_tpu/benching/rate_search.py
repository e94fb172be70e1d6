"""Finds the highest request rate that keeps the limits of `bench.slo`: bisection over trials, each its own cell.

A trial's result depends on its cell alone, so an interrupted search resumes from the files of its finished trials.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gemma4_tpu.benching.cells import Cell
from gemma4_tpu.benching.latencies import LAG_MS
from gemma4_tpu.benching.one_cell import MEASURED, OK, OVERLOADED
from gemma4_tpu.benching.slo import Limit
from gemma4_tpu.prices import usd_per_million_tokens

PRECISION = 0.02
"""The rate found keeps the limits, and one higher by this share does not."""
ROUNDS = 3
"""Number of trials at the rate found that must keep the limits, each with other prompts and arrivals."""
GROWTH = 1.1
"""Factor of the first step up from the saturation rate; each step is the square of the one before."""
GIVE_UP = 16
"""A limit that still breaks at the saturation rate divided by this does not depend on the rate."""
_THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput")

Measure = Callable[[Cell], dict[str, Any]]
"""Runs a cell, or returns its known result."""


@dataclass(frozen=True, kw_only=True)
class RateFound:
    """The result of a search, for one pair of lengths."""

    input_tokens: int
    output_tokens: int
    rate: float | None = None
    """The highest rate that keeps the limits, in requests per second; None: none does, or none breaks them."""
    cells: tuple[str, ...] = ()
    """Names of the trials at that rate."""
    breaks_at: float | None = None
    """The lowest rate tried above it, which breaks a limit; None: none did."""
    breaks_by: str | None = None
    """The limit that breaks there; without a rate: why there is none."""
    trials: int = 0

    @property
    def told(self) -> str:
        """The result in a sentence."""
        lengths = f"{self.input_tokens:,} in, {self.output_tokens:,} out"
        if self.rate is None and self.breaks_at is None:
            return f"{lengths}: no rate found: {self.breaks_by}"
        if self.rate is None:
            return f"{lengths}: no rate keeps the limits ({self.breaks_by})"
        return f"{lengths}: {self.rate:g} requests/s keep the limits; {self.breaks_at:g} don't ({self.breaks_by})"


def figures_of(
    found: RateFound, results: Mapping[Cell, Mapping[str, Any]], usd_per_hour: float | None
) -> dict[str, Any]:
    """What `result.json` contains about a search: means over the trials at its rate, and the maximum over all trials.

    Args:
      found: the search's result.
      results: those of all trials.
      usd_per_hour: price of the server; None: unknown.
    """
    own = {
        cell.name: result
        for cell, result in results.items()
        if (cell.input_tokens, cell.output_tokens) == (found.input_tokens, found.output_tokens)
        and "completed" in result
    }
    at = [own[name] for name in found.cells]
    most = {key: max((result[key] for result in own.values()), default=None) for key in _THROUGHPUTS}
    goodput = statistics.fmean(result["request_goodput"] for result in at) if at else None
    tokens = {"output": found.output_tokens, "total": found.input_tokens + found.output_tokens}
    return {
        **asdict(found),
        **{key: statistics.fmean(result[key] for result in at) if at else None for key in _THROUGHPUTS},
        "request_goodput": goodput,
        **{f"saturation_{key}": value for key, value in most.items()},
        **{
            f"usd_per_million_{kind}_tokens": usd_per_million_tokens(usd_per_hour, count * (goodput or 0))
            for kind, count in tokens.items()
        },
    }


def broken(result: dict[str, Any], limits: list[Limit]) -> str | None:
    """Which limit a trial breaks; None: it keeps all."""
    if result["state"] not in MEASURED:
        return str(result["reason"])
    if result["state"] == OVERLOADED:
        return "overloaded: arrivals outpace completions"
    if result["median_sending_lag_ms"] > LAG_MS:
        return f"this client sent {result['median_sending_lag_ms']:,.0f} ms late (median): it cannot send faster"
    for limit in limits:
        found = result[limit.key]
        if found is None or found > limit.ms:
            return f"{limit.key} {'unknown' if found is None else f'{found:,.1f}'}, more than {limit.ms:g}"
    return None


class RateSearch:
    """Searches for the highest rate for one pair of lengths."""

    def __init__(self, measure: Measure, limits: list[Limit], input_tokens: int, output_tokens: int):
        self._measure, self._limits = measure, limits
        self._input_tokens, self._output_tokens = input_tokens, output_tokens
        self._results: dict[Cell, dict[str, Any]] = {}
        self._held: list[float] = []  # rates whose trials keep the limits, ascending
        self._broken: list[tuple[float, str]] = []  # rates that don't, descending, each with the reason

    def run(self) -> RateFound:
        """Runs all trials, one after the other."""
        burst = self._trial(math.inf)
        if not burst.get("completed"):
            return self._found(None, burst["reason"])
        start, step = burst["request_throughput"], GROWTH
        while True:
            low = self._held[-1] if self._held else 0.0
            high = self._broken[-1][0] if self._broken else math.inf
            if high <= low * (1 + PRECISION):
                if self._is_confirmed(low):
                    return self._found(low, self._broken[-1][1])
            elif math.isinf(high) and low * LAG_MS / 1000 > burst["completed"]:
                # A client can't send faster, and from here on each factor is the square of the one before, for ever.
                count = f"{burst['completed']:,} requests"
                return self._found(
                    None, f"{count} keep them even all at once; give more bench.requests, or lower limits"
                )
            elif math.isinf(high):
                self._try(low * step if low else start)
                step *= step if low else 1
            elif low:
                self._try(math.sqrt(low * high))
            elif high > start / GIVE_UP:
                self._try(high / 2)
            else:
                return self._found(None, self._broken[-1][1])

    def _try(self, rate: float) -> None:
        rate = float(f"{rate:.4g}")
        result = self._trial(rate)
        why = broken(result, self._limits)
        if why and result["state"] == OK:  # a single hiccup of the server would drive the search far below its rate
            why = broken(self._trial(rate, 2), self._limits)
        if why is None:
            self._held.append(rate)
        else:
            self._broken.append((rate, why))

    def _is_confirmed(self, rate: float) -> bool:
        """Whether the rate keeps the limits in every round; if not, it counts as broken."""
        for number in range(1, ROUNDS + 1):
            if why := broken(self._trial(rate, number), self._limits):
                self._held.pop()
                self._broken.append((rate, why))
                return False
        return True

    def _trial(self, rate: float, number: int = 1) -> dict[str, Any]:
        cell = self._cell(rate, number)
        if cell not in self._results:
            self._results[cell] = self._measure(cell)
        return self._results[cell]

    def _cell(self, rate: float, number: int) -> Cell:
        return Cell(self._input_tokens, self._output_tokens, rate=rate, round=number)

    def _found(self, rate: float | None, why: str) -> RateFound:
        cells = () if rate is None else tuple(self._cell(rate, number).name for number in range(1, ROUNDS + 1))
        return RateFound(
            input_tokens=self._input_tokens, output_tokens=self._output_tokens, rate=rate, cells=cells,
            breaks_at=self._broken[-1][0] if self._broken else None, breaks_by=why, trials=len(self._results),
        )  # fmt: skip
