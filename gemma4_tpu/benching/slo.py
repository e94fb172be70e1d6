"""Limits on latency (`bench.slo`): a key of a cell's result, named as in `vllm bench serve`, and its maximum."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

METRICS = ("ttft", "tpot", "itl", "e2el")
_KEY = re.compile(rf"(mean|median|p([1-9]\d?))_({'|'.join(METRICS)})_ms")
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


def limits_of(slo: Mapping[str, float]) -> list[Limit]:
    """The limits of `bench.slo`, without invalid keys (which the checks refuse)."""
    return [limit for key, ms in slo.items() if (limit := _read(str(key), ms))]


def _read(key: str, ms: float) -> Limit | None:
    if not (found := _KEY.fullmatch(key)):
        return None
    statistic, percentile, metric = found.groups()
    return Limit(key, metric, 50 if statistic == "median" else int(percentile) if percentile else None, ms)


def slo_problems(slo: Mapping[str, float], requests: int, *, searched: bool) -> Iterator[str]:
    """Problems with `bench.slo`. `searched`: whether a rate is searched for, with trials of `requests` each."""
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
                f"bench.requests={requests}: too few for {key}, which would be that of the slowest; give at least"
                f" {limit.least_requests:,}, better {limit.enough_requests:,}"
            )
