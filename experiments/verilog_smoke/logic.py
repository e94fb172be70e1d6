"""Combinational families of gates, multiplexers and tables. Each function draws one design."""

from __future__ import annotations

from random import Random

from experiments.verilog_smoke.design import Design
from experiments.verilog_smoke.parts import GATES, INPUTS, OUTPUTS, SELECTS, WIDTHS, bits, data_in, data_out


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
        family="wire",
        ports=(data_in(a, width), data_out(y, width)),
        behaviours=behaviours,
        summary=f"{'inverter' if inverted else 'buffer'}, {bits(width)}",
        body=(f"assign {y} = {'~' * inverted}{a};",),
    )


def gate(rng: Random) -> Design:
    (a, b), y, width, kind = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(WIDTHS), rng.choice(list(GATES))
    bitwise = "bitwise " if width > 1 else ""
    return Design(
        family="gate",
        ports=(data_in(a, width), data_in(b, width), data_out(y, width)),
        behaviours=(
            f"The module should set {y} to the {bitwise}{kind} of {a} and {b}.",
            f"{y} is the {bitwise}{kind} of the inputs {a} and {b}.",
            f"Combine {a} and {b} with a {bitwise}{kind} gate and output it on {y}.",
        ),
        summary=f"{kind} gate, {bits(width)}",
        body=(f"assign {y} = {_gate_expression(kind, [a, b])};",),
    )


def gate3(rng: Random) -> Design:
    names, y, kind = rng.sample(INPUTS, 3), rng.choice(OUTPUTS), rng.choice(list(GATES))
    flipped = rng.choice([None, *names])
    operands = [f"~{name}" if name == flipped else name for name in names]
    listed = [f"the inverse of {name}" if name == flipped else name for name in names]
    spoken = f"{listed[0]}, {listed[1]} and {listed[2]}"
    return Design(
        family="gate3",
        ports=(*map(data_in, names), data_out(y)),
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
        family="two_gates",
        ports=(data_in(a), data_in(b), data_in(c), data_out(y)),
        behaviours=(
            f"The module should first form the {first} of {a} and {b}, then set {y} to the {second} of that and {c}.",
            f"A first gate makes the {first} of {a} and {b}. A second gate makes the {second} of its output and {c}: "
            f"that is {y}.",
        ),
        summary=f"{first} gate into {second} gate",
        body=(f"assign {y} = {expression};",),
    )


def mux2(rng: Random) -> Design:
    (a, b), y, sel, width = rng.sample(INPUTS, 2), rng.choice(OUTPUTS), rng.choice(SELECTS), rng.choice(WIDTHS)
    return Design(
        family="mux2",
        ports=(data_in(a, width), data_in(b, width), data_in(sel), data_out(y, width)),
        behaviours=(
            f"The module should implement a 2-to-1 multiplexer. When {sel} is 0, {y} is {a}. "
            f"When {sel} is 1, {y} is {b}.",
            f"{y} is {b} while {sel} is 1, and {a} while {sel} is 0.",
            f"Select with {sel} which input drives {y}: 0 selects {a}, 1 selects {b}.",
        ),
        summary=f"2-to-1 multiplexer, {bits(width)}",
        body=(f"assign {y} = {sel} ? {b} : {a};",),
    )


def mux4(rng: Random) -> Design:
    names, y, sel, width = rng.sample(INPUTS, 4), rng.choice(OUTPUTS), rng.choice(SELECTS), rng.choice(WIDTHS)
    a, b, c, d = names
    return Design(
        family="mux4",
        ports=(*(data_in(name, width) for name in names), data_in(sel, 2), data_out(y, width)),
        behaviours=(
            f"The module should implement a 4-to-1 multiplexer. {sel} values 0, 1, 2 and 3 choose {a}, {b}, {c} and "
            f"{d} for {y}.",
            f"Select with {sel} which input drives {y}: 0 selects {a}, 1 selects {b}, 2 selects {c}, 3 selects {d}.",
        ),
        summary=f"4-to-1 multiplexer, {bits(width)}",
        body=(f"assign {y} = {sel}[1] ? ({sel}[0] ? {d} : {c}) : ({sel}[0] ? {b} : {a});",),
    )


def decoder(rng: Random) -> Design:
    a, y, width, enabled = rng.choice(INPUTS), rng.choice(OUTPUTS), rng.choice((2, 3, 4)), rng.random() < 0.5
    enable = rng.choice(("en", "enable"))
    condition = f" While {enable} is 0, {y} is 0." if enabled else ""
    return Design(
        family="decoder",
        ports=(data_in(a, width), *((data_in(enable),) if enabled else ()), data_out(y, 2**width)),
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
        family="truth_table",
        ports=(*map(data_in, names), data_out(y, reg=True)),
        behaviours=(
            f"The module should implement this truth table.{table_text}",
            f"{y} depends on the inputs as the table says.{table_text}",
        ),
        summary="truth table " + "".join(str(value) for _, value in rows),
        body=(
            "always @(*)",
            f"  case ({{{', '.join(names)}}})",
            *(f"    2'b{inputs}: {y} = {value};" for inputs, value in rows),
            "  endcase",
        ),
    )
