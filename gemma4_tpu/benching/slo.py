"""Limits on latency (`bench.slo`): each is a key of a cell, as `vllm bench serve` names them, and its highest value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

METRICS = ("ttft", "tpot", "itl", "e2el")
_KEY = re.compile(rf"(mean|median|p([1-9]\d?))_({'|'.join(METRICS)})_ms")
_BEYOND = 10
"""Requests that should lie beyond a percentile, for its figure to be more than that of the slowest few."""


@dataclass(frozen=True)
class Limit:
    """One of them."""

    key: str
    """Of the cell's result, such as `p99_ttft_ms`."""
    metric: str
    """One of `METRICS`."""
    percentile: int | None
    """None: the mean."""
    ms: float
    """The figure may be so large."""

    @property
    def least_requests(self) -> int:
        """Of fewer, one alone would lie beyond the percentile."""
        return 1 if self.percentile is None else math.ceil(round(100 / (100 - self.percentile), 6))

    @property
    def enough_requests(self) -> int:
        """Of so many, ten lie beyond the percentile: a p99 of 1,000 is between p98.4 and p99.6 (19 times of 20)."""
        return _BEYOND * self.least_requests


def limits_of(slo: Mapping[str, float]) -> list[Limit]:
    """The limits of `bench.slo`; keys that are none are left out (the checks refuse them)."""
    return [limit for key, ms in slo.items() if (limit := _read(str(key), ms))]


def _read(key: str, ms: float) -> Limit | None:
    if not (found := _KEY.fullmatch(key)):
        return None
    statistic, percentile, metric = found.groups()
    return Limit(key, metric, 50 if statistic == "median" else int(percentile) if percentile else None, ms)


def slo_problems(slo: Mapping[str, float], requests: int, *, searched: bool) -> Iterator[str]:
    """What speaks against `bench.slo`. `searched`: the highest rate is, by trials of `requests` each."""
    for key, ms in slo.items():
        limit = _read(str(key), ms)
        if limit is None:
            yield (
                f"bench.slo.{key}={ms}: not a limit; such as p99_ttft_ms=500 (mean, median or p1 to p99, of"
                f" {', '.join(METRICS)}, in ms)"
            )
        elif not 0 < ms < math.inf:
            yield f"bench.slo.{key}={ms}: must be a number of ms more than 0"
        elif searched and requests < limit.least_requests:
            yield (
                f"bench.requests={requests}: {key} of so few is that of the slowest; give at least"
                f" {limit.least_requests:,}, better {limit.enough_requests:,}"
            )
