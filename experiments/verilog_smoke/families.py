"""All families, and drawing from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from experiments.verilog_smoke.arithmetic import (
    adder,
    compare,
    concat,
    extend,
    min_max,
    pick_bit,
    reduce,
    rotate,
    shift,
)
from experiments.verilog_smoke.clocked import counter, edge_detector, flip_flop, shift_register, toggle
from experiments.verilog_smoke.design import Design
from experiments.verilog_smoke.logic import decoder, gate, gate3, mux2, mux4, truth_table, two_gates, wire

FAMILIES: dict[str, Callable[[Random], Design]] = {
    draw.__name__: draw
    for draw in (
        *(wire, gate, gate3, two_gates, mux2, mux4, adder, compare, min_max, reduce, shift, rotate, concat, pick_bit),
        *(extend, decoder, truth_table, flip_flop, toggle, counter, shift_register, edge_detector),
    )
}

HELDOUT_BUCKETS = 10
"""One in this many modules is reserved for held-out problems, whatever the seed: `Design.bucket` decides."""


def is_heldout(design: Design) -> bool:
    """Whether the design's module belongs to the held-out problems. Training data and base text leave it out."""
    return design.bucket(HELDOUT_BUCKETS) == 0


def draw_designs(rng: Random, *, heldout: bool, max_misses: int = 2000) -> Iterator[Design]:
    """Designs without repeats of (module, behaviour form), one family after the other, until all are exhausted.

    A family counts as exhausted after `max_misses` draws in a row that gave nothing new on this side of the split.
    """
    seen: set[str] = set()
    families = dict(FAMILIES)
    while families:
        for name, draw in list(families.items()):
            for _ in range(max_misses):
                design = draw(rng)
                module = design.module()
                if module not in seen and is_heldout(design) == heldout:
                    seen.add(module)
                    yield design
                    break
            else:
                del families[name]
