"""The cells of a load test, each with its own seed, and the times at which their requests are sent."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from gemma4_tpu.config.serving import BenchConfig


@dataclass(frozen=True)
class Cell:
    """One load."""

    input_tokens: int
    output_tokens: int
    rate: float | None = None
    """Requests per second; `inf`: all at once; None: determined by `users`."""
    users: int | None = None
    """Concurrent requests; None: unlimited."""
    round: int = 1
    """The same load can be measured several times, with other prompts and arrivals."""

    @property
    def name(self) -> str:
        """The cell's name, and that of its file."""
        load = f"rate{self.rate:g}" if self.rate is not None else f"users{self.users}"
        again = f"_round{self.round}" if self.round > 1 else ""
        return f"in{self.input_tokens}_out{self.output_tokens}_{load}{again}"

    @property
    def shown(self) -> str:
        return f"{self.input_tokens:,} in, {self.output_tokens:,} out, {self.load}"

    @property
    def load(self) -> str:
        """The rate or the number of users, without lengths."""
        if self.rate is not None:
            again = f", round {self.round}" if self.round > 1 else ""
            return f"{rate_text(self.rate)} requests/s{again}"
        return f"{self.users:,} user{'s' * (self.users != 1)}"

    def requests(self, config: BenchConfig) -> int:
        """The total number of requests."""
        return config.requests * (self.users or 1)


def cells_of(config: BenchConfig) -> list[Cell]:
    """All cells in the order in which they run: from light load to heavy, for each pair of lengths."""
    cells = []
    for input_tokens, output_tokens in config.lengths:
        cells += [Cell(input_tokens, output_tokens, rate=rate) for rate in sorted(config.rates)]
        cells += [Cell(input_tokens, output_tokens, users=users) for users in sorted(config.users)]
    return cells


def is_search(config: BenchConfig) -> bool:
    """Whether the cells are not listed but are trials of a search for the highest rate that keeps `bench.slo`."""
    return bool(config.slo) and not config.rates and not config.users


def rate_text(rate: float) -> str:
    """Requests per second, for people."""
    return "∞" if math.isinf(rate) else f"{rate:g}"


def generator(config: BenchConfig, cell: Cell, attempt: int) -> np.random.Generator:
    """The cell's own random generator; another attempt gets another, so that its prompts are in no prefix cache."""
    return np.random.default_rng([config.seed, zlib.crc32(cell.name.encode()), attempt])


def arrivals_seconds(rng: np.random.Generator, count: int, rate: float, kind: str) -> list[float]:
    """Send times of the requests, from the start of the cell; the last at `count / rate`, as in `vllm bench serve`."""
    if math.isinf(rate):
        return [0.0] * count
    distances = np.ones(count) if kind == "fixed" else rng.exponential(size=count)
    times = np.cumsum(distances)
    return (times * (count / rate / times[-1])).tolist()
