"""Limits on latency (`bench.slo`), such as `ttft_p99<500ms,tpot_p50<30ms`. A figure can be as high as its limit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gemma4_tpu.config.keys import did_you_mean

METRICS = ("ttft", "tpot", "itl", "e2el")
"""As a cell's keys name them."""
_METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}
"""As limits name them."""
_TAKEN = {**_METRICS, "e2el": "e2el"}
_UNITS = {"ms": 1.0, "s": 1000.0}
_ITEM = re.compile(r"\s*(?P<name>[^<>=≤≥]*)(?P<operator>[<>=≤≥]*)\s*(?P<value>[^<>=≤≥]*?)\s*")
_VALUE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>.*)")
_STATISTIC = re.compile(r"mean|median|p[1-9]\d?")
_EXAMPLE = "ttft_p99<500ms"
_BEYOND = 10
"""Requests that should be beyond a percentile, so that its figure is not just that of the slowest few."""


@dataclass(frozen=True)
class Limit:
    """One limit."""

    key: str
    """Key of the cell's result, such as `p99_ttft_ms`."""
    metric: str
    """One of `METRICS`."""
    percentile: int | None
    """None: the mean."""
    ms: float
    """Largest figure that keeps the limit."""

    @property
    def least_requests(self) -> int:
        """With fewer requests, only one would be beyond the percentile."""
        return 1 if self.percentile is None else math.ceil(round(100 / (100 - self.percentile), 6))

    @property
    def enough_requests(self) -> int:
        """With this many, ten are beyond the percentile: a p99 of 1,000 is within p98.4 to p99.6 (19 times in 20)."""
        return _BEYOND * self.least_requests


def limits_of(slo: str) -> list[Limit]:
    """The limits of `bench.slo`; what is none is left out (the checks refuse it)."""
    return [limit for item in _items(slo) if isinstance(limit := _read(item), Limit)]


def slo_problems(slo: str, requests: int, *, searched: bool) -> Iterator[str]:
    """What speaks against `bench.slo`. `searched`: the highest rate is, by trials of `requests` each."""
    limits = [(item, _read(item)) for item in _items(slo)]
    known = [limit.key for _, limit in limits if isinstance(limit, Limit)]
    for item, limit in limits:
        if isinstance(limit, str):
            place = "" if item == slo else f"{item.strip() or 'nothing next to a comma'}: "
            yield f"bench.slo={slo}: {place}{limit}"
        elif searched and requests < limit.least_requests:
            yield (
                f"bench.requests={requests}: {limit.key} of so few is that of the slowest; give at least"
                f" {limit.least_requests:,}, better {limit.enough_requests:,}"
            )
    if twice := next((key for key in known if known.count(key) > 1), None):
        yield f"bench.slo={slo}: two limits for {twice}; give one"


def _items(slo: str) -> list[str]:
    return slo.split(",") if slo.strip() else []


def _read(item: str) -> Limit | str:
    """The limit, or what is wrong with it."""
    if (parts := _ITEM.fullmatch(item)) is None or not parts["name"].strip():
        return f"not a limit; separate limits by commas and write each as {_EXAMPLE}"
    name, operator, value = parts["name"].strip().lower(), parts["operator"], parts["value"].lower()
    metric, _, statistic = name.partition("_")
    if metric not in _TAKEN or not _STATISTIC.fullmatch(statistic):
        return _no_such_figure(name)
    if operator != "<":
        found = f"{operator} is not an operator here" if operator else "there is no limit"
        return f"{found}; latencies have upper limits: {name}<{value or '500ms'}"
    number = _VALUE.fullmatch(value)
    if number is None or number["unit"] not in _UNITS:
        meant = (
            f"write {name}<{value}ms or {name}<{value}s" if number and not number["unit"] else f"such as {name}<500ms"
        )
        return f"{value or 'nothing'} is not a time in ms or s; {meant}"
    if not 0 < (ms := float(number["number"]) * _UNITS[number["unit"]]) < math.inf:
        return f"{value} must be more than 0 and finite"
    return _limit(_TAKEN[metric], statistic, ms)


def _limit(metric: str, statistic: str, ms: float) -> Limit:
    if statistic == "mean":
        return Limit(f"mean_{metric}_ms", metric, None, ms)
    if statistic in ("median", "p50"):
        return Limit(f"median_{metric}_ms", metric, 50, ms)
    return Limit(f"{statistic}_{metric}_ms", metric, int(statistic[1:]), ms)


def _no_such_figure(name: str) -> str:
    """A name that is none, such as vLLM's `p99_ttft_ms`."""
    names = [f"{metric}_{statistic}" for metric in _METRICS for statistic in ("mean", "median", "p50", "p90", "p99")]
    turned = re.fullmatch(rf"({_STATISTIC.pattern})_({'|'.join(_TAKEN)})(_ms)?", name)
    meant = f"; did you mean {turned[2]}_{turned[1]}?" if turned else did_you_mean(name, names)
    return f"no such figure{meant} (mean, median or p1 to p99 of {', '.join(_METRICS)}: such as {_EXAMPLE})"
