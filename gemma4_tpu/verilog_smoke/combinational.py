"""Combinational families. Each function draws one design; every name, width and operator is a parameter."""

from __future__ import annotations

from random import Random

from gemma4_tpu.verilog_smoke.design import Design, Port

INPUTS = ("a", "b", "c", "d", "x", "w", "u", "v", "in0", "in1", "in2", "in3")
OUTPUTS = ("out", "y", "z", "f", "o")
SELECTS = ("sel", "s", "choice")
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
VECTOR_WIDTHS = WIDTHS[1:]

# Gate → (operator, inverted).
GATES = {
    "AND": ("&", False), "OR": ("|", False), "XOR": ("^", False),
    "NAND": ("&", True), "NOR": ("|", True), "XNOR": ("^", True),
}
COMPARISONS = {
    "==": "equal to", "!=": "different from", "<": "less than", ">": "greater than",
    "<=": "less than or equal to", ">=": "greater than or equal to",
}


def bits(width: int) -> str:
    return "1 bit" if width == 1 else f"{width} bits"


def _in(name: str, width: int = 1) -> Port:
    return Port(name=name, width=width)


def _out(name: str, width: int = 1, *, reg: bool = False) -> Port:
    return Port(name=name, width=width, output=True, reg=reg)


def _gate_expression(gate: str, operands: list[str]) -> str:
    operator, inverted = GATES[gate]
    joined = f" {operator} ".join(operands)
    return f"~({joined})" if inverted else joined


def wire(rng: Random) -> Design:
    a, y, width = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(WIDTHS)
    inverted = rng.random() < 0.5
    if inverted:
        behaviours = (
            f"The module should set {y} to the bitwise inverse of {a}.",
            f"{y} is the NOT of {a}.",
            f"Invert every bit of {a} and drive {y} with it.",
        )
    else:
        behaviours = (
            f"The module should connect {a} to {y} unchanged.",
            f"{y} always equals {a}.",
            f"Pass {a} through to {y}, like a wire.",
        )
    return Design(
        family="wire", ports=(_in(a, width), _out(y, width)), behaviours=behaviours,
        summary=f"{'inverter' if inverted else 'buffer'}, {bits(width)}", body=(f"assign {y} = {'~' * inverted}{a};",),
    )


def gate(rng: Random) -> Design:
    (a, b), y, width, kind = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(WIDTHS), rng.choice(list(GATES))
    bitwise = "bitwise " if width > 1 else ""
    return Design(
        family="gate", ports=(_in(a, width), _in(b, width), _out(y, width)),
        behaviours=(
            f"The module should set {y} to the {bitwise}{kind} of {a} and {b}.",
            f"{y} is the {bitwise}{kind} of the inputs {a} and {b}.",
            f"Combine {a} and {b} with a {bitwise}{kind} gate and output it on {y}.",
        ),
        summary=f"{kind} gate, {bits(width)}", body=(f"assign {y} = {_gate_expression(kind, [a, b])};",),
    )


def gate3(rng: Random) -> Design:
    names, y, kind = rng.sample(INPUTS, 3), rng.choice(OUTPUTS), rng.choice(list(GATES))
    flipped = rng.choice([None, *names])
    operands = [f"~{name}" if name == flipped else name for name in names]
    listed = [f"the inverse of {name}" if name == flipped else name for name in names]
    spoken = f"{listed[0]}, {listed[1]} and {listed[2]}"
    return Design(
        family="gate3", ports=(*map(_in, names), _out(y)),
        behaviours=(
            f"The module should set {y} to the {kind} of {spoken}.",
            f"{y} is the {kind} of {spoken}.",
            f"Implement a 3-input {kind} gate: it combines {spoken} and drives {y}.",
        ),
        summary=f"3-input {kind} gate" + (f", {flipped} inverted" if flipped else ""),
        body=(f"assign {y} = {_gate_expression(kind, operands)};",),
    )


def two_gates(rng: Random) -> Design:
    (a, b, c), y = rng.sample(INPUTS, 3), rng.choice(OUTPUTS)
    first, second = rng.sample(("AND", "OR", "XOR"), 2)
    expression = f"({a} {GATES[first][0]} {b}) {GATES[second][0]} {c}"
    return Design(
        family="two_gates", ports=(_in(a), _in(b), _in(c), _out(y)),
        behaviours=(
            f"The module should first form the {first} of {a} and {b}, then set {y} to the {second} of that and {c}.",
            f"A first gate makes the {first} of {a} and {b}. A second gate makes the {second} of its output and {c}: "
            f"that is {y}.",
        ),
        summary=f"{first} gate into {second} gate", body=(f"assign {y} = {expression};",),
    )


def mux2(rng: Random) -> Design:
    (a, b), y, sel, width = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(SELECTS), rng.choice(WIDTHS)
    return Design(
        family="mux2", ports=(_in(a, width), _in(b, width), _in(sel), _out(y, width)),
        behaviours=(
            f"The module should implement a 2-to-1 multiplexer. When {sel} is 0, {y} is {a}. When {sel} is 1, {y} is {b}.",
            f"{y} is {b} while {sel} is 1, and {a} while {sel} is 0.",
            f"Select with {sel} which input drives {y}: 0 selects {a}, 1 selects {b}.",
        ),
        summary=f"2-to-1 multiplexer, {bits(width)}", body=(f"assign {y} = {sel} ? {b} : {a};",),
    )


def mux4(rng: Random) -> Design:
    names, y, sel, width = rng.sample(INPUTS, 4), rng.choice(OUTPUTS), rng.choice(SELECTS), rng.choice(WIDTHS)
    a, b, c, d = names
    return Design(
        family="mux4", ports=(*(_in(name, width) for name in names), _in(sel, 2), _out(y, width)),
        behaviours=(
            f"The module should implement a 4-to-1 multiplexer. {sel} values 0, 1, 2 and 3 choose {a}, {b}, {c} and {d} "
            f"for {y}.",
            f"Select with {sel} which input drives {y}: 0 selects {a}, 1 selects {b}, 2 selects {c}, 3 selects {d}.",
        ),
        summary=f"4-to-1 multiplexer, {bits(width)}",
        body=(f"assign {y} = {sel}[1] ? ({sel}[0] ? {d} : {c}) : ({sel}[0] ? {b} : {a});",),
    )


def adder(rng: Random) -> Design:
    (a, b), width = rng.sample(INPUTS, 2), rng.choice(VECTOR_WIDTHS)
    kind = rng.choice(["sum", "difference", "carry"])
    y = rng.choice(OUTPUTS)
    operands = (_in(a, width), _in(b, width))
    if kind == "carry":
        carry = rng.choice(["cout", "carry"])
        return Design(
            family="adder", ports=(*operands, _out(y, width), _out(carry)),
            behaviours=(
                f"The module should add {a} and {b}. {y} is the sum and {carry} is the carry out.",
                f"Add the unsigned numbers {a} and {b}, with the sum on {y} and the carry on {carry}.",
            ),
            summary=f"adder with carry out, {bits(width)}", body=(f"assign {{{carry}, {y}}} = {a} + {b};",),
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
        family="adder", ports=(*operands, _out(y, width)), behaviours=behaviours, summary=f"{word}, {bits(width)}",
        body=(f"assign {y} = {a} {operator} {b};",),
    )


def compare(rng: Random) -> Design:
    (a, b), y, width = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS)
    operator = rng.choice(list(COMPARISONS))
    words = COMPARISONS[operator]
    return Design(
        family="compare", ports=(_in(a, width), _in(b, width), _out(y)),
        behaviours=(
            f"The module should set {y} to 1 when {a} is {words} {b}, and to 0 otherwise. The numbers are unsigned.",
            f"{y} tells whether the unsigned number {a} is {words} {b}.",
            f"Compare the unsigned inputs: {y} is high if {a} is {words} {b}, else low.",
        ),
        summary=f"comparator, {words}, {bits(width)}", body=(f"assign {y} = {a} {operator} {b};",),
    )


def min_max(rng: Random) -> Design:
    (a, b), y, width = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS)
    word, long, operator = rng.choice([("smaller", "minimum", "<"), ("larger", "maximum", ">")])
    return Design(
        family="min_max", ports=(_in(a, width), _in(b, width), _out(y, width)),
        behaviours=(
            f"The module should set {y} to the {word} of the unsigned numbers {a} and {b}.",
            f"{y} is the {long} of {a} and {b}, which are unsigned.",
        ),
        summary=f"{long}, {bits(width)}", body=(f"assign {y} = ({a} {operator} {b}) ? {a} : {b};",),
    )


def reduce(rng: Random) -> Design:
    a, y, width, kind = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS), rng.choice(list(GATES))
    operator, inverted = GATES[kind]
    return Design(
        family="reduce", ports=(_in(a, width), _out(y)),
        behaviours=(
            f"The module should set {y} to the {kind} of all bits of {a}.",
            f"{y} is the {kind} of the {width} bits of {a}.",
            f"Reduce the vector {a} with {kind} to the single bit {y}.",
        ),
        summary=f"{kind} reduction, {bits(width)}", body=(f"assign {y} = {'~' * inverted}{operator}{a};",),
    )


def shift(rng: Random) -> Design:
    a, y, width = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS[2:])
    amount, left = rng.randint(1, 3), rng.random() < 0.5
    side, operator = ("left", "<<") if left else ("right", ">>")
    places = "one place" if amount == 1 else f"{amount} places"
    return Design(
        family="shift", ports=(_in(a, width), _out(y, width)),
        behaviours=(
            f"The module should shift {a} {side} by {places} and fill with zeros. {y} is the result.",
            f"{y} is {a} shifted {side} by {places}. Zeros move in.",
        ),
        summary=f"logical shift {side} by {amount}, {bits(width)}", body=(f"assign {y} = {a} {operator} {amount};",),
    )


def rotate(rng: Random) -> Design:
    a, y, width, left = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS[2:]), rng.random() < 0.5
    side = "left" if left else "right"
    body = f"{{{a}[{width - 2}:0], {a}[{width - 1}]}}" if left else f"{{{a}[0], {a}[{width - 1}:1]}}"
    return Design(
        family="rotate", ports=(_in(a, width), _out(y, width)),
        behaviours=(
            f"The module should rotate {a} {side} by one place. {y} is the result.",
            f"{y} is {a} rotated {side} by one place: the bit that falls out comes in at the other end.",
        ),
        summary=f"rotate {side} by 1, {bits(width)}", body=(f"assign {y} = {body};",),
    )


def concat(rng: Random) -> Design:
    (a, b), y = rng.sample(INPUTS, 2), rng.choice(OUTPUTS)
    width_a, width_b = rng.choice((1, 2, 3, 4, 8)), rng.choice((1, 2, 3, 4, 8))
    return Design(
        family="concat", ports=(_in(a, width_a), _in(b, width_b), _out(y, width_a + width_b)),
        behaviours=(
            f"The module should join {a} and {b} to {y}. {a} forms the upper bits and {b} the lower bits.",
            f"{y} is the concatenation of {a}, on the left, and {b}, on the right.",
        ),
        summary=f"concatenation, {width_a} and {width_b} bits", body=(f"assign {y} = {{{a}, {b}}};",),
    )


def pick_bit(rng: Random) -> Design:
    a, y, width = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice(VECTOR_WIDTHS)
    index = rng.randrange(min(width, 10))
    return Design(
        family="pick_bit", ports=(_in(a, width), _out(y)),
        behaviours=(
            f"The module should connect bit {index} of {a} to {y}. Bit 0 is the lowest.",
            f"{y} is bit number {index} of the vector {a}, counted from 0.",
        ),
        summary=f"picks bit {index} of {width}", body=(f"assign {y} = {a}[{index}];",),
    )


def extend(rng: Random) -> Design:
    a, y, width = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice((2, 3, 4, 5, 6, 7, 8))
    added, signed = rng.choice((1, 2, 4, 8)), rng.random() < 0.5
    kind = "sign" if signed else "zero"
    fill = f"{{{added}{{{a}[{width - 1}]}}}}" if signed else f"{added}'b0"
    return Design(
        family="extend", ports=(_in(a, width), _out(y, width + added)),
        behaviours=(
            f"The module should {kind}-extend {a} by {bits(added)}. {y} is the result.",
            f"{y} is {a} with {kind} extension: {bits(added)} more at the top.",
        ),
        summary=f"{kind} extension by {added}, {bits(width)}", body=(f"assign {y} = {{{fill}, {a}}};",),
    )


def decoder(rng: Random) -> Design:
    a, y, width, enabled = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice((2, 3, 4)), rng.random() < 0.5
    enable = rng.choice(("en", "enable"))
    condition = f" While {enable} is 0, {y} is 0." if enabled else ""
    return Design(
        family="decoder",
        ports=(_in(a, width), *((_in(enable),) if enabled else ()), _out(y, 2**width)),
        behaviours=(
            f"The module should implement a decoder: only the bit of {y} with the number {a} is 1.{condition}",
            f"{y} is one-hot: {a} gives the number of the bit that is 1, the others are 0.{condition}",
        ),
        summary=f"{width}-to-{2**width} decoder" + (", with enable" if enabled else ""),
        body=(f"assign {y} = {enable} ? (1 << {a}) : 0;" if enabled else f"assign {y} = 1 << {a};",),
    )


def truth_table(rng: Random) -> Design:
    names, y = rng.sample(INPUTS, 2), rng.choice(OUTPUTS)
    table = rng.randint(1, 14)  # 0 and 15 are constants
    rows = [(format(row, "02b"), table >> row & 1) for row in range(4)]
    listed = "\n".join(f" {' '.join(inputs)} | {value}" for inputs, value in rows)
    table_text = f"\n\n {' '.join(names)} | {y}\n{listed}"
    return Design(
        family="truth_table", ports=(*map(_in, names), _out(y, reg=True)),
        behaviours=(
            f"The module should implement this truth table.{table_text}",
            f"{y} depends on the inputs as the table says.{table_text}",
        ),
        summary="truth table " + "".join(str(value) for _, value in rows),
        body=(
            "always @(*)", f"  case ({{{', '.join(names)}}})",
            *(f"    2'b{inputs}: {y} = {value};" for inputs, value in rows), "  endcase",
        ),
    )


COMBINATIONAL = (
    wire, gate, gate3, two_gates, mux2, mux4, adder, compare, min_max, reduce, shift, rotate, concat, pick_bit, extend,
    decoder, truth_table,
)
