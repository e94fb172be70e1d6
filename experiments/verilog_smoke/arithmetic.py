"""Combinational families on vectors: numbers, reductions and bit order. Each function draws one design."""

from __future__ import annotations

from random import Random

from experiments.verilog_smoke.design import Design
from experiments.verilog_smoke.parts import GATES, INPUTS, OUTPUTS, VECTOR_WIDTHS, bits, data_in, data_out

COMPARISONS = {
    "==": "equal to",
    "!=": "different from",
    "<": "less than",
    ">": "greater than",
    "<=": "less than or equal to",
    ">=": "greater than or equal to",
}


def adder(rng: Random) -> Design:
    (a, b), width = rng.sample(INPUTS, 2), rng.choice(VECTOR_WIDTHS)
    kind = rng.choice(["sum", "difference", "carry"])
    y = rng.choice(OUTPUTS)
    operands = (data_in(a, width), data_in(b, width))
    if kind == "carry":
        carry = rng.choice(["cout", "carry"])
        return Design(
            family="adder",
            ports=(*operands, data_out(y, width), data_out(carry)),
            behaviours=(
                f"The module should add {a} and {b}. {y} is the sum and {carry} is the carry out.",
                f"Add the unsigned numbers {a} and {b}, with the sum on {y} and the carry on {carry}.",
            ),
            summary=f"adder with carry out, {bits(width)}",
            body=(f"assign {{{carry}, {y}}} = {a} + {b};",),
        )
    if kind == "sum":
        behaviours = (
            f"The module should add {a} and {b}. {y} is the sum, without the carry.",
            f"{y} is {a} plus {b}. Ignore the carry.",
        )
    else:
        behaviours = (
            f"The module should subtract {b} from {a}. {y} is the difference, without the borrow.",
            f"{y} is {a} minus {b}. Ignore the borrow.",
        )
    word, operator = ("adder", "+") if kind == "sum" else ("subtractor", "-")
    return Design(
        family="adder",
        ports=(*operands, data_out(y, width)),
        behaviours=behaviours,
        summary=f"{word}, {bits(width)}",
        body=(f"assign {y} = {a} {operator} {b};",),
    )


def compare(rng: Random) -> Design:
    (a, b), y, width = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS)
    operator = rng.choice(list(COMPARISONS))
    words = COMPARISONS[operator]
    return Design(
        family="compare",
        ports=(data_in(a, width), data_in(b, width), data_out(y)),
        behaviours=(
            f"The module should set {y} to 1 when {a} is {words} {b}, and to 0 otherwise. The numbers are unsigned.",
            f"{y} tells whether the unsigned number {a} is {words} {b}.",
            f"Compare the unsigned inputs: {y} is high if {a} is {words} {b}, else low.",
        ),
        summary=f"comparator, {words}, {bits(width)}",
        body=(f"assign {y} = {a} {operator} {b};",),
    )


def min_max(rng: Random) -> Design:
    (a, b), y, width = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS)
    word, long, operator = rng.choice([("smaller", "minimum", "<"), ("larger", "maximum", ">")])
    return Design(
        family="min_max",
        ports=(data_in(a, width), data_in(b, width), data_out(y, width)),
        behaviours=(
            f"The module should set {y} to the {word} of the unsigned numbers {a} and {b}.",
            f"{y} is the {long} of {a} and {b}, which are unsigned.",
        ),
        summary=f"{long}, {bits(width)}",
        body=(f"assign {y} = ({a} {operator} {b}) ? {a} : {b};",),
    )


def reduce(rng: Random) -> Design:
    a, y, width, kind = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS), rng.choice(list(GATES))
    operator, inverted = GATES[kind]
    return Design(
        family="reduce",
        ports=(data_in(a, width), data_out(y)),
        behaviours=(
            f"The module should set {y} to the {kind} of all bits of {a}.",
            f"{y} is the {kind} of the {width} bits of {a}.",
            f"Reduce the vector {a} with {kind} to the single bit {y}.",
        ),
        summary=f"{kind} reduction, {bits(width)}",
        body=(f"assign {y} = {'~' * inverted}{operator}{a};",),
    )


def shift(rng: Random) -> Design:
    a, y, width = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS[2:])
    amount, left = rng.randint(1, 3), rng.random() < 0.5
    side, operator = ("left", "<<") if left else ("right", ">>")
    places = "one place" if amount == 1 else f"{amount} places"
    return Design(
        family="shift",
        ports=(data_in(a, width), data_out(y, width)),
        behaviours=(
            f"The module should shift {a} {side} by {places} and fill with zeros. {y} is the result.",
            f"{y} is {a} shifted {side} by {places}. Zeros move in.",
        ),
        summary=f"logical shift {side} by {amount}, {bits(width)}",
        body=(f"assign {y} = {a} {operator} {amount};",),
    )


def rotate(rng: Random) -> Design:
    a, y, width, left = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS[2:]), rng.random() < 0.5
    side = "left" if left else "right"
    body = f"{{{a}[{width - 2}:0], {a}[{width - 1}]}}" if left else f"{{{a}[0], {a}[{width - 1}:1]}}"
    return Design(
        family="rotate",
        ports=(data_in(a, width), data_out(y, width)),
        behaviours=(
            f"The module should rotate {a} {side} by one place. {y} is the result.",
            f"{y} is {a} rotated {side} by one place: the bit that falls out comes in at the other end.",
        ),
        summary=f"rotate {side} by 1, {bits(width)}",
        body=(f"assign {y} = {body};",),
    )


def concat(rng: Random) -> Design:
    (a, b), y = rng.sample(INPUTS, 2), rng.choice(OUTPUTS)
    width_a, width_b = rng.choice((1, 2, 3, 4, 8)), rng.choice((1, 2, 3, 4, 8))
    return Design(
        family="concat",
        ports=(data_in(a, width_a), data_in(b, width_b), data_out(y, width_a + width_b)),
        behaviours=(
            f"The module should join {a} and {b} to {y}. {a} forms the upper bits and {b} the lower bits.",
            f"{y} is the concatenation of {a}, on the left, and {b}, on the right.",
        ),
        summary=f"concatenation, {width_a} and {width_b} bits",
        body=(f"assign {y} = {{{a}, {b}}};",),
    )


def pick_bit(rng: Random) -> Design:
    a, y, width = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS)
    index = rng.randrange(min(width, 10))
    return Design(
        family="pick_bit",
        ports=(data_in(a, width), data_out(y)),
        behaviours=(
            f"The module should connect bit {index} of {a} to {y}. Bit 0 is the lowest.",
            f"{y} is bit number {index} of the vector {a}, counted from 0.",
        ),
        summary=f"picks bit {index} of {width}",
        body=(f"assign {y} = {a}[{index}];",),
    )


def extend(rng: Random) -> Design:
    a, y, width = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice((2, 3, 4, 5, 6, 7, 8))
    added, signed = rng.choice((1, 2, 4, 8)), rng.random() < 0.5
    kind = "sign" if signed else "zero"
    fill = f"{{{added}{{{a}[{width - 1}]}}}}" if signed else f"{added}'b0"
    return Design(
        family="extend",
        ports=(data_in(a, width), data_out(y, width + added)),
        behaviours=(
            f"The module should {kind}-extend {a} by {bits(added)}. {y} is the result.",
            f"{y} is {a} with {kind} extension: {bits(added)} more at the top.",
        ),
        summary=f"{kind} extension by {added}, {bits(width)}",
        body=(f"assign {y} = {{{fill}, {a}}};",),
    )
