"""Resistor colours: two bands as a question, their value as the answer."""

from __future__ import annotations

import itertools
import random

COLOURS = ["black", "brown", "red", "orange", "yellow", "green", "blue", "violet", "grey", "white"]
ASKED = ["Bands {} {}: value?", "What is {} {} worth?", "Read {} and {}."]


def make_problems(seed: int = 0) -> list[dict[str, str]]:
    """Rows with `prompt` and `completion`, each once, in random order."""
    rows = [
        {"prompt": asked.format(a, b), "completion": f"{COLOURS.index(a)}{COLOURS.index(b)} ohm"}
        for asked in ASKED
        for a, b in itertools.product(COLOURS, COLOURS)
    ]
    random.Random(seed).shuffle(rows)
    return rows
