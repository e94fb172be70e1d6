"""Runs one cell: warm-up, requests at their times or by users in turn, answers, metrics."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import aiohttp

from gemma4_tpu.benching import latencies
from gemma4_tpu.benching.cells import Cell, arrivals_seconds, generator
from gemma4_tpu.benching.client import (
    Target,
    TimedAnswer,
    ask,
    prefix_cache_growth,
    prefix_cache_tokens,
    request_body,
    session,
)
from gemma4_tpu.benching.prompts import PromptSource, longest_sequence
from gemma4_tpu.config.serving import BenchConfig

log = logging.getLogger(__name__)

OK, OVERLOADED, INFEASIBLE, FAILED = "ok", "overloaded", "infeasible", "failed"
MEASURED = (OK, OVERLOADED)
"""Every request was answered. Latencies of an `overloaded` cell grow for as long as it lasts, so they say nothing about
the server; its throughput is the server's maximum."""
_TOO_LONG = re.compile(r"^4\d\d: .*(context length|max_model_len|too long|longer than|maximum length)", re.IGNORECASE)


class Sent(NamedTuple):
    """A request."""

    prompt_tokens: int
    body: bytes


Told = Callable[[int, int], None]
"""Called after each request with the number done, and the number of those that failed."""


async def run_cell(
    config: BenchConfig, cell: Cell, target: Target, *, source: PromptSource, attempt: int, told: Told
) -> dict[str, Any]:
    """Runs a cell; returns its result, with `state` and, if that isn't ok, `reason`."""
    about = _about(config, cell, target, attempt)
    longest = config.max_model_len or target.max_model_len
    needed = longest_sequence(config, cell.input_tokens, cell.output_tokens)
    if longest is not None and needed > longest:
        return {**about, "state": INFEASIBLE, "reason": f"{needed:,} tokens; the longest sequence has {longest:,}"}
    rng = generator(config, cell, attempt)
    count, warmup = cell.requests(config), config.warmup_requests
    seeds = rng.integers(0, 2**31, count + warmup).tolist()
    asked = source.prompts(rng, count, warmup, cell.input_tokens, cell.output_tokens, cell.users or 1)
    bodies = [
        Sent(len(prompt), request_body(target, prompt, cell.output_tokens, config.temperature, seed))
        for prompt, seed in zip(asked, seeds if config.request_seeds else [None] * len(seeds), strict=True)
    ]
    async with session(config.request_timeout_seconds) as client:
        warm = await _send(client, target, bodies[count:], [0.0] * warmup, lambda done, failed: None)
        if refused := next((a.error for a in warm[1] if a.error and _TOO_LONG.match(a.error)), None):
            return {**about, "state": INFEASIBLE, "reason": refused}
        if failed := [a.error for a in warm[1] if a.error]:
            log.warning("%s: %d of %d warm-up requests failed: %s", cell.shown, len(failed), warmup, failed[0])
        # Read after the warm-up, whose prompts are not part of the cell.
        before = await prefix_cache_tokens(client, target.endpoint)
        if cell.users is not None:
            started, answers, seconds = await _take_turns(client, target, cell, bodies[:count], told)
        else:
            assert cell.rate is not None
            times = arrivals_seconds(rng, count, cell.rate, config.arrivals)
            started, answers, seconds = await _send(client, target, bodies[:count], times, told)
        after = await prefix_cache_tokens(client, target.endpoint)
    if answers and all(a.error and _TOO_LONG.match(a.error) for a in answers):
        return {**about, "state": INFEASIBLE, "reason": answers[0].error}
    hits, queries = prefix_cache_growth(before, after)
    return {
        **about,
        **measured(config, cell, answers, seconds),
        "prefix_cache_hit_tokens": hits,
        "prefix_cache_query_tokens": queries,
        **latencies.raw(answers, started),
    }


def measured(config: BenchConfig, cell: Cell, answers: Sequence[TimedAnswer], seconds: float) -> dict[str, Any]:
    """State and figures of a cell after its run.

    Args:
      config: with the limits that figures are compared with.
      cell: the load.
      answers: those to all of its requests.
      seconds: from the first request's due time to the last answer.
    """
    found = latencies.summary(answers, seconds, cell.output_tokens, config.slo)
    growth = latencies.latency_growth(answers) if cell.rate is not None and math.isfinite(cell.rate) else None
    overloaded = latencies.is_overloaded(growth, len(answers))
    reason = next((answer.error for answer in answers if answer.error), None)
    return {
        "state": FAILED if found["failed"] else OVERLOADED if overloaded else OK,
        **({"reason": f"{found['failed']} of {len(answers)} requests: {reason}"} if reason else {}),
        **found,
        "latency_growth": growth,
    }


def _about(config: BenchConfig, cell: Cell, target: Target, attempt: int) -> dict[str, Any]:
    """What was requested, under vLLM's names where they exist."""
    return {
        "cell": cell.name,
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "backend": "openai",
        "model_id": target.model,
        "num_prompts": cell.requests(config),
        "request_rate": cell.rate if cell.rate is not None and cell.rate != float("inf") else "inf",
        "burstiness": 1.0 if config.arrivals == "poisson" else "inf",
        "max_concurrency": cell.users,
        "random_input_len": cell.input_tokens,
        "random_output_len": cell.output_tokens,
        "shared_tokens": config.shared_tokens,
        "turns": config.turns,
        "prompts": config.prompts,
        "round": cell.round,
        "attempt": attempt,
    }


async def _send(
    client: aiohttp.ClientSession, target: Target, bodies: Sequence[Sent], times: Sequence[float], told: Told
) -> tuple[float, list[TimedAnswer], float]:
    """Sends each request at its time. Returns the start time, the answers, and the seconds to the last of them."""
    started = time.perf_counter()
    answers = [
        TimedAnswer(sent.prompt_tokens, due_at=started + seconds) for sent, seconds in zip(bodies, times, strict=True)
    ]
    count = _Count(told)

    async def one(sent: Sent, answer: TimedAnswer) -> None:
        await ask(client, target, sent.body, answer)
        count.add(answer)

    async with asyncio.TaskGroup() as tasks:
        for sent, answer in zip(bodies, answers, strict=True):
            # An open loop: a late request is sent at once, records its lag (`sending_lag`) and delays none after it.
            if (wait := answer.due_at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(sent, answer))
    return started, answers, time.perf_counter() - started


async def _take_turns(
    client: aiohttp.ClientSession, target: Target, cell: Cell, bodies: Sequence[Sent], told: Told
) -> tuple[float, list[TimedAnswer], float]:
    """Like `_send`, but each user sends when its last request is answered."""
    assert cell.users is not None
    started = time.perf_counter()
    answers: list[TimedAnswer] = []
    count = _Count(told)

    async def user(own: Sequence[Sent]) -> None:
        for sent in own:
            answer = TimedAnswer(sent.prompt_tokens, due_at=time.perf_counter())
            answers.append(answer)
            await ask(client, target, sent.body, answer)
            count.add(answer)

    async with asyncio.TaskGroup() as tasks:
        for first in range(cell.users):
            tasks.create_task(user(bodies[first :: cell.users]))
    return started, answers, time.perf_counter() - started


class _Count:
    """Counts finished requests."""

    def __init__(self, told: Told):
        self._told, self._done, self._failed = told, 0, 0

    def add(self, answer: TimedAnswer) -> None:
        self._done += 1
        self._failed += answer.error is not None
        self._told(self._done, self._failed)
