"""Random stimulus for a module: the values of its inputs, row by row.

A row that changes a clock changes nothing else, so no input changes together with an edge. Inputs are not just drawn
uniformly: in episodes they are held, mostly 0 or mostly 1, one-hot, or equal to each other, so that counters wrap,
comparisons become true and enables last.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from gemma4_tpu.evals.verilog.ports import Port, Roles

EXHAUSTIVE_BITS = 10
"""Combinational modules with at most this many input bits get every input."""
VECTORS, CYCLES, EPISODE = 1000, 500, 25
AFTER_ALL = 100
"""Number of random vectors after every input has occurred once, since latches have a state."""
RESET_CYCLES = 3
"""Cycles at the start, without comparison, if there is a reset."""
RESET_RATES = (0.0, 0.02, 0.02, 0.2, 0.6)
"""Rates at which an episode asserts a reset; the last ones also cover a wrongly inferred polarity."""

Row = tuple[bool, dict[str, int]]
"""(whether outputs are compared, value of each input)."""


def stimulus(ports: Sequence[Port], roles: Roles, seed: str) -> list[Row]:
    """Rows for a module with these `ports`; determined by `seed`."""
    inputs = {port.name: port.bits for port in ports if port.direction == "INPUT"}
    rng = random.Random(seed)
    if roles.clocks:
        return list(_clocked(inputs, roles, rng))
    few = sum(inputs.values()) <= EXHAUSTIVE_BITS
    return [*_every(inputs, rng), *_vectors(inputs, rng, AFTER_ALL)] if few else list(_vectors(inputs, rng, VECTORS))


def _every(inputs: dict[str, int], rng: random.Random) -> Iterator[Row]:
    """Every input once, in random order."""
    numbers = list(range(1 << sum(inputs.values())))
    rng.shuffle(numbers)
    for number in numbers:
        row = {}
        for name, bits in inputs.items():
            row[name], number = number & ((1 << bits) - 1), number >> bits
        yield True, row


def _vectors(inputs: dict[str, int], rng: random.Random, count: int) -> Iterator[Row]:
    row = dict.fromkeys(inputs, 0)
    yield True, row
    yield True, {name: (1 << bits) - 1 for name, bits in inputs.items()}
    for number in range(count):
        if number % EPISODE == 0:
            habits = {name: rng.randrange(_HABITS) for name in inputs}
        row = _drawn(row, inputs, habits, rng)
        yield True, row


def _clocked(inputs: dict[str, int], roles: Roles, rng: random.Random) -> Iterator[Row]:
    """Cycles of every clock; other inputs change before rising edges, and occasionally while the clock is high."""
    data = {name: inputs[name] for name in roles.data}
    row = dict.fromkeys(inputs, 0) | {name: int(level) for name, level in roles.resets.items()}
    for cycle in range(-RESET_CYCLES if roles.resets else 0, CYCLES):
        if max(cycle, 0) % EPISODE == 0:
            habits = {name: rng.randrange(_HABITS) for name in data}
            rates = {name: rng.choice(RESET_RATES) for name in roles.resets}
        compare = cycle >= 0
        ticking = [name for name in roles.clocks if len(roles.clocks) == 1 or not compare or rng.random() < 0.7]
        for clock, level in [(name, level) for level in (1, 0) for name in ticking]:
            if clock == ticking[0] and (level or rng.random() < 0.25):
                row = _drawn(row, data, habits, rng)
                if compare:
                    row |= {n: int((rng.random() < rates[n]) == level) for n, level in roles.resets.items()}
                yield compare, row
            row = {**row, clock: level}
            yield compare, row


def _drawn(row: dict[str, int], names: dict[str, int], habits: dict[str, int], rng: random.Random) -> dict[str, int]:
    """`row` with new values for the inputs in `names` (name → bits)."""
    row = dict(row)
    for name, bits in names.items():
        draw = rng.getrandbits
        match habits[name]:
            case 0 | 1:
                row[name] = draw(bits)
            case 2:
                row[name] = row[name] if rng.random() < 0.85 else draw(bits)
            case 3:
                row[name] = draw(bits) & draw(bits) & draw(bits)
            case 4:
                row[name] = draw(bits) | draw(bits) | draw(bits)
            case 5:
                row[name] = 1 << rng.randrange(bits)
            case 6:
                row[name] = rng.choice((0, (1 << bits) - 1))
            case _:
                alike = [row[other] for other, width in names.items() if width == bits and other != name]
                row[name] = rng.choice(alike) if alike else (row[name] + 1) & ((1 << bits) - 1)
    return row


_HABITS = 8
