"""Summarises a cell's answers under the key names of `vllm bench serve`, with its definitions:

TTFT: from sending to the first chunk with choices. TPOT: (E2EL - TTFT) / (output tokens - 1) of each request. ITL: all
gaps between chunks, pooled. E2EL: from sending to the last chunk with choices. Only complete answers count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4_tpu.benching.client import TimedAnswer
from gemma4_tpu.benching.slo import METRICS, Limit, limits_of

P99_FROM = 100
"""A 99th percentile of fewer values is just the largest one or two; it is marked."""
LAG_MS = 10.0
"""A client that sends later than this (median) distorts the measurement."""
OUTRUN = 0.05
"""Accepted growth of latency per second of load: over a thousand requests, chance or a server at its limit."""


def summary(answers: Sequence[TimedAnswer], duration_seconds: float, output_tokens: int, slo: str) -> dict[str, Any]:
    """Counts, throughputs and latencies of one cell.

    Args:
      answers: those to all of its requests.
      duration_seconds: from the first request's due time to the last answer.
      output_tokens: requested length of each answer.
      slo: limits as in `bench.slo`; adds their percentiles, and the number of requests that keep them.
    """
    done = [answer for answer in answers if answer.error is None]
    total_in, total_out = sum(a.prompt_tokens for a in done), sum(a.output_tokens for a in done)
    chunks = sum(answer.chunks for answer in done)
    limits = limits_of(slo)
    seconds = {
        "ttft": [a.ttft_seconds for a in done],
        "tpot": [tpot for a in done if (tpot := a.tpot_seconds) is not None],
        "itl": [gap for a in done for gap in a.gaps_seconds],
        "e2el": [a.latency_seconds for a in done],
    }
    lags_ms = [(a.sent_at - a.due_at) * 1000 for a in answers]
    return {
        "duration": duration_seconds,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": len(done) / duration_seconds,
        "output_throughput": total_out / duration_seconds,
        "total_token_throughput": (total_in + total_out) / duration_seconds,
        "request_goodput": _goodput(done, limits) / duration_seconds if limits else None,
        "max_output_tokens_per_s": _most_in_a_second(done),
        "max_concurrent_requests": _most_at_a_time(answers),
        **{key: value for name in METRICS for key, value in _statistics(name, seconds[name]).items()},
        **{limit.key: _figure(limit, seconds[limit.metric]) for limit in limits},
        "p99_marked": [name for name in METRICS if len(seconds[name]) < P99_FROM],
        "median_sending_lag_ms": float(np.median(lags_ms)) if lags_ms else None,
        "max_sending_lag_ms": max(lags_ms, default=None),
        "chunks_per_token": chunks / total_out if total_out else None,
        "tokens_counted_by": "server" if all(a.counted for a in done) else "chunks",
        "short_answers": sum(a.output_tokens < output_tokens for a in done),
    }


def latency_growth(answers: Sequence[TimedAnswer]) -> float | None:
    """Growth of latency per second during which requests are sent, in seconds; None: too few answers.

    A server that completes C of R > C arriving requests per second falls behind, and latency grows by R / C - 1 per
    second. Below capacity, latency does not depend on when a request arrived.
    """
    done = [answer for answer in answers if answer.error is None]
    sent, latencies = (np.array([getattr(a, name) for a in done]) for name in ("sent_at", "latency_seconds"))
    if len(done) < 3 or not np.ptp(sent):
        return None
    away = sent - sent.mean()
    return float(away @ latencies / (away @ away))  # least squares


def is_overloaded(growth: float | None, requests: int) -> bool:
    """Whether arrivals outpaced completions by more than chance: in a Poisson process with a fixed end, the number of
    requests that are early or late in a row is typically at most half the square root of their number.
    """
    return growth is not None and growth > max(OUTRUN, 1 / math.sqrt(requests))


def raw(answers: Sequence[TimedAnswer], started_at: float) -> dict[str, Any]:
    """Figures of each request (seconds), as in `vllm bench serve --save-detailed`; failed requests have none."""
    return {
        "input_lens": [a.prompt_tokens for a in answers],
        "output_lens": [a.output_tokens if a.error is None else 0 for a in answers],
        "ttfts": [_micro(a.ttft_seconds) if a.error is None else 0.0 for a in answers],
        "itls": [[_micro(gap) for gap in a.gaps_seconds] if a.error is None else [] for a in answers],
        "start_times": [_micro(a.sent_at - started_at) for a in answers],
        "errors": [a.error or "" for a in answers],
    }


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {f"{statistic}_{name}_ms": None for statistic in ("mean", "median", "std", "p99")}
    ms = np.asarray(seconds) * 1000
    return {
        f"mean_{name}_ms": float(ms.mean()),
        f"median_{name}_ms": float(np.median(ms)),
        f"std_{name}_ms": float(ms.std()),
        f"p99_{name}_ms": float(np.percentile(ms, 99)),
    }


def _goodput(done: Sequence[TimedAnswer], limits: Sequence[Limit]) -> int:
    """Number of requests that keep every limit themselves, whatever its percentile. As in vLLM, ITL does not count."""

    def keeps(answer: TimedAnswer) -> bool:
        own = {"ttft": answer.ttft_seconds, "tpot": answer.tpot_seconds, "e2el": answer.latency_seconds}
        return all((own.get(limit.metric) or 0.0) * 1000 <= limit.ms for limit in limits)

    return sum(map(keeps, done))


def _figure(limit: Limit, seconds: Sequence[float]) -> float | None:
    """The figure that is compared with a limit, in ms."""
    if not seconds:
        return None
    return 1000 * float(np.mean(seconds) if limit.percentile is None else np.percentile(seconds, limit.percentile))


def _most_in_a_second(done: Sequence[TimedAnswer]) -> float:
    """Most output tokens in one second, counting whole seconds from the first request."""
    if not done:
        return 0.0
    start = min(answer.sent_at for answer in done)
    times = [np.cumsum([a.sent_at - start + a.ttft_seconds, *a.gaps_seconds]) for a in done]
    tokens = [np.full(a.chunks, a.output_tokens / a.chunks) for a in done]
    return float(np.bincount(np.concatenate(times).astype(int), np.concatenate(tokens)).max())


def _most_at_a_time(answers: Sequence[TimedAnswer]) -> int:
    """Most complete answers that were in progress at the same moment."""
    done = [a for a in answers if a.error is None and a.last_at is not None]
    turns = sorted([(a.sent_at, 1) for a in done] + [(a.last_at, -1) for a in done])
    return int(max(np.cumsum([change for _, change in turns]), default=0))


def _micro(seconds: float) -> float:
    return round(seconds, 6)
