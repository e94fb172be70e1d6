"""What a cell's answers amount to, under the key names of `vllm bench serve`, and with its definitions:

TTFT: from sending to the first chunk with choices. TPOT: (E2EL - TTFT) / (output tokens - 1) of each request. ITL: all
gaps between chunks, pooled. E2EL: from sending to the last chunk with choices. Only complete answers count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4_tpu.benching.client import TimedAnswer

P99_FROM = 100
"""A 99th percentile of fewer values is that of the largest one or two; it is marked."""
METRICS = ("ttft", "tpot", "itl", "e2el")


def summary(answers: Sequence[TimedAnswer], duration_seconds: float, output_tokens: int) -> dict[str, Any]:
    """Counts, throughputs and latencies of one cell.

    Args:
      answers: of all its requests.
      duration_seconds: from the first request's turn to the last answer.
      output_tokens: what each answer was asked to have.
    """
    done = [answer for answer in answers if answer.error is None]
    total_in, total_out = sum(a.prompt_tokens for a in done), sum(a.output_tokens for a in done)
    chunks = sum(answer.chunks for answer in done)
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
        "max_concurrent_requests": _most_at_a_time(answers),
        **{key: value for name in METRICS for key, value in _statistics(name, seconds[name]).items()},
        "p99_marked": [name for name in METRICS if len(seconds[name]) < P99_FROM],
        "median_sending_lag_ms": float(np.median(lags_ms)) if lags_ms else None,
        "max_sending_lag_ms": max(lags_ms, default=None),
        "chunks_per_token": chunks / total_out if total_out else None,
        "tokens_counted_by": "server" if all(a.counted for a in done) else "chunks",
        "short_answers": sum(a.output_tokens < output_tokens for a in done),
    }


def raw(answers: Sequence[TimedAnswer], started_at: float) -> dict[str, Any]:
    """Each request's own figures (seconds), as `vllm bench serve --save-detailed` has them; none of failed ones."""
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


def _most_at_a_time(answers: Sequence[TimedAnswer]) -> int:
    """Complete answers that were under way at the same moment, at most."""
    done = [a for a in answers if a.error is None and a.last_at is not None]
    turns = sorted([(a.sent_at, 1) for a in done] + [(a.last_at, -1) for a in done])
    return int(max(np.cumsum([change for _, change in turns]), default=0))


def _micro(seconds: float) -> float:
    return round(seconds, 6)
