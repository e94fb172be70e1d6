"""Many users at once on the local server (`serving=local`), through OpenAI's own client: failures, latencies, leaks.

    python -m benchmarks.serving_load                              64 users for 60 s
    python -m benchmarks.serving_load --users 16 --seconds 10

Users send one request after the other: streams of completions, chats, and now and then one that they leave in the
middle, or one that is longer than the server takes. The model is the tiny checkpoint that travels with the package.
Exit code 1: a request failed, or something of it stayed in the server.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil

from benchmarks.pages import measured
from gemma4_tpu import assets
from gemma4_tpu.markdown import table

MIB = 2**20
LONGEST = 512
SETTLED_PART = 1 / 3
"""Of the time, until every path of the server has run and its pools have their size."""
GROWTH_MIB = 10.0
"""The resident set may grow by so much from then on."""
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Of asyncio's pool, which fills as it is needed and stays."""
DRAIN_SECONDS = 10.0
KINDS = ("leave", "too long", "chat", "chat", "chat", "leave", *["stream"] * 14)
"""Of requests, in the order in which a user takes them; every user begins at another place."""


@dataclass(frozen=True)
class Footprint:
    """What a process holds at a moment."""

    rss_mib: float
    threads: int
    fds: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        process = psutil.Process(pid)
        with process.oneshot():
            return cls(process.memory_info().rss / MIB, process.num_threads(), process.num_fds())


@dataclass
class Load:
    """What happened under the load."""

    users: int
    seconds: float
    growth_mib: float
    ended: Counter[str] = field(default_factory=Counter)
    """`completed`, `left` (by the client, on purpose), `refused` (too long, on purpose), `failed`."""
    failures: Counter[str] = field(default_factory=Counter)
    ttft_ms: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    """Of completed requests."""
    tokens: int = 0
    """Completed requests' answers."""
    before: Footprint | None = None
    settled: Footprint | None = None
    after: Footprint | None = None
    under_way: int = 0
    """Answers that the server still has when all clients are gone."""

    @property
    def leaks(self) -> list[str]:
        """What stayed."""
        assert self.before and self.settled and self.after
        grown = self.after.rss_mib - self.settled.rss_mib
        found = [f"{grown:.1f} MiB more after the load than a third into it"] if grown > self.growth_mib else []
        found += [f"{self.under_way} answers under way"] if self.under_way else []
        if self.after.fds > self.before.fds:
            found.append(f"{self.after.fds - self.before.fds} file descriptors")
        if self.after.threads > self.before.threads + POOL_THREADS:
            found.append(f"{self.after.threads - self.before.threads} threads")
        return found


def drive(url: str, pid: int, users: int, seconds: float, growth_mib: float = GROWTH_MIB) -> Load:
    """Puts the load on a server whose process is `pid`, and waits until it has gone quiet."""
    load = Load(users, seconds, growth_mib, before=Footprint.of(pid))
    asyncio.run(_all_users(url, pid, load))
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        health = httpx.get(f"{url}/health", timeout=60).json()
        load.under_way = health["running"] + health["waiting"]
        load.after = Footprint.of(pid)
        if not load.leaks or time.monotonic() > deadline:
            return load
        time.sleep(0.2)


async def _all_users(url: str, pid: int, load: Load) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        until = time.monotonic() + load.seconds

        async def watch() -> None:
            await asyncio.sleep(load.seconds * SETTLED_PART)
            load.settled = Footprint.of(pid)

        async def user(number: int) -> None:
            draw = random.Random(number)
            kinds = itertools.cycle(KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)])
            while time.monotonic() < until:
                try:
                    load.ended[await _one(client, next(kinds), draw, load)] += 1
                except (openai.OpenAIError, httpx.HTTPError, AssertionError) as error:
                    load.ended["failed"] += 1
                    load.failures[f"{type(error).__name__}: {error}"[:200]] += 1

        await asyncio.gather(watch(), *(user(number) for number in range(load.users)))


async def _one(client: openai.AsyncOpenAI, kind: str, draw: random.Random, load: Load) -> str:
    """One request of a kind; returns how it ended."""
    prompt = [draw.randrange(256, 512) for _ in range(draw.randint(4, 200))]
    count = draw.randint(4, 48)
    asked = {"model": "tiny", "temperature": draw.choice((0, 0.8)), "max_tokens": count}
    exact = {"ignore_eos": True}
    started = time.perf_counter()
    if kind == "too long":
        try:
            await client.completions.create(**asked, prompt=[300] * LONGEST)
        except openai.BadRequestError:
            return "refused"
        raise AssertionError("a prompt that is too long was answered")
    if kind == "chat":
        turns = [{"role": "user", "content": " ".join(f"x{token}" for token in prompt[:20])}]
        chat = await client.chat.completions.create(**asked, messages=turns, extra_body=exact)
        assert chat.usage.completion_tokens == count, "an answer of another length"
    else:
        stream = await client.completions.create(**asked, prompt=prompt, stream=True, extra_body=exact)
        chunks, first = 0, 0.0
        async with stream:
            async for _ in stream:
                chunks += 1
                first = first or time.perf_counter()
                if kind == "leave" and chunks == count // 2:
                    return "left"
        assert chunks == count, "an answer of another length"
        load.ttft_ms.append((first - started) * 1000)
    load.latency_ms.append((time.perf_counter() - started) * 1000)
    load.tokens += count
    return "completed"


def tables(load: Load) -> str:
    """The result as Markdown."""
    assert load.before and load.settled and load.after
    total = sum(load.ended.values())
    rows = [("users at a time", f"{load.users}"), ("seconds", f"{load.seconds:g}"), ("requests", f"{total:,}")]
    rows += [
        (told, f"{load.ended[kind]:,}")
        for kind, told in (("completed", "completed"), ("left", "left by the client in the middle of the answer"),
                           ("refused", "refused as too long, as they were"), ("failed", "failed"))
    ]  # fmt: skip
    rows += [(f"failure: {error}", f"{count:,}") for error, count in load.failures.items()]
    rows += [("tokens per second of completed answers", f"{load.tokens / load.seconds:,.0f}")]
    for name, values in (("TTFT (streams)", load.ttft_ms), ("latency", load.latency_ms)):
        rows += [(f"{name} p{p}, ms", f"{np.percentile(values, p):,.0f}") for p in (50, 99)]
    text = "\n".join(table(["", ""], rows))
    moments = (("before", load.before), ("a third into it", load.settled), ("after", load.after))
    cells = [[when, f"{now.rss_mib:,.1f}", now.threads, now.fds] for when, now in moments]
    held = "\n".join(table(["server's process", "RSS, MiB", "threads", "file descriptors"], cells, "lrrr"))
    left = f"Left in the server: {'; '.join(load.leaks)}." if load.leaks else "Nothing is left in the server."
    return f"{text}\n{held}\n{left}"


@contextmanager
def served(model: Path, record: Path, words: list[str]) -> Iterator[tuple[int, str]]:
    """A server that answers: its process, and its URL. `words`: the first is its `serving=`."""
    command = [sys.executable, "-m", "gemma4_tpu.serve", *words, f"run={model}", f"run_dir={record}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    assert process.stdout
    try:
        told = process.stdout.readline()
        if not told.startswith("endpoint: "):
            sys.exit(f"{words[0]}: no server (exit code {process.wait()})")
        yield process.pid, told.removeprefix("endpoint: ").strip().removesuffix("/v1")
    finally:
        process.terminate()
        process.communicate()


def main() -> int:
    """Exit code: 0; 1: failed requests, or a leak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    stamp = measured("openai")
    with tempfile.TemporaryDirectory(prefix="serving-load-") as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["serving=local", f"serving.port={port}", f"serving.max_model_len={LONGEST}"]
        with served(Path(assets.ROOT, "tiny"), Path(folder, "record"), words) as (pid, url):
            load = drive(url, pid, given.users, given.seconds)
    print(f"{stamp}\n\n{tables(load)}")
    return 1 if load.ended["failed"] or load.leaks else 0


if __name__ == "__main__":
    sys.exit(main())
