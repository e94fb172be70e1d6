"""Clocked families, with the variants of reset, enable and clock edge that specifications like to vary."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from experiments.verilog_smoke.design import Design, DesignPort
from experiments.verilog_smoke.parts import bits

DATA = ("d", "in", "x", "data", "a")
STATES = ("q", "out", "count", "y", "state")
CLOCKS = ("clk", "clock")
ENABLES = ("en", "enable", "ce")
RESETS = ("reset", "rst", "clear")
RESETS_LOW = ("resetn", "rst_n")
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Control:
    """Clock, reset and enable of a register, and how to speak of them."""

    clock: str
    reset: str | None
    asynchronous: bool
    active_low: bool
    enable: str | None

    @property
    def ports(self) -> tuple[DesignPort, ...]:
        ports = [DesignPort(name=self.clock, role="clock")]
        if self.reset:
            ports.append(DesignPort(name=self.reset, role="reset_low" if self.active_low else "reset"))
        if self.enable:
            ports.append(DesignPort(name=self.enable, role="enable"))
        return tuple(ports)

    def sentences(self, state: str) -> tuple[str, str]:
        """Two phrasings of reset and enable, each starting with a space, or empty."""
        if not self.reset:
            formal = spoken = ""
        else:
            kind = "asynchronous" if self.asynchronous else "synchronous"
            level = "low" if self.active_low else "high"
            formal = f" {self.reset} is an active-{level} {kind} reset to 0."
            moment = "at once" if self.asynchronous else f"at the edge of {self.clock}"
            spoken = f" While {self.reset} is {int(not self.active_low)}, {state} becomes 0 {moment}."
        if self.enable:
            formal += f" {self.enable} is the enable: {state} holds its value while {self.enable} is 0."
            spoken += f" Without {self.enable}, {state} keeps its value."
        return formal, spoken

    @property
    def summary(self) -> str:
        words = []
        if self.reset:
            words.append(f"{'async' if self.asynchronous else 'sync'} reset{' low' if self.active_low else ''}")
        if self.enable:
            words.append("enable")
        return "".join(f", {word}" for word in words)

    def always(self, state: str, update: str) -> tuple[str, ...]:
        """The always block in which `state` takes `update` at each clock edge."""
        edge = f"posedge {self.clock}"
        if self.asynchronous:
            edge += f" or {'negedge' if self.active_low else 'posedge'} {self.reset}"
        lines = [f"always @({edge})"]
        if self.reset:
            lines.append(f"  if ({'!' * self.active_low}{self.reset}) {state} <= 0;")
        prefix = "else " if self.reset else ""
        condition = f"if ({self.enable}) " if self.enable else ""
        lines.append(f"  {prefix}{condition}{state} <= {update};")
        return tuple(lines)


def _control(rng: Random, *, must_reset: bool) -> Control:
    with_reset = must_reset or rng.random() < 0.6
    active_low = with_reset and rng.random() < 0.4
    return Control(
        clock=rng.choice(CLOCKS),
        reset=rng.choice(RESETS_LOW if active_low else RESETS) if with_reset else None,
        asynchronous=with_reset and rng.random() < 0.5,
        active_low=active_low,
        enable=rng.choice(ENABLES) if rng.random() < 0.4 else None,
    )


def _state_port(name: str, width: int = 1) -> DesignPort:
    return DesignPort(name=name, width=width, output=True, reg=True)


def flip_flop(rng: Random) -> Design:
    d, q, width, control = rng.choice(DATA), rng.choice(STATES), rng.choice(WIDTHS), _control(rng, must_reset=False)
    formal, spoken = control.sentences(q)
    thing = "a D flip-flop" if width == 1 else f"a register of {width} D flip-flops"
    return Design(
        family="flip_flop",
        ports=(*control.ports, DesignPort(name=d, width=width), _state_port(q, width)),
        behaviours=(
            f"The module should implement {thing}: {q} takes the value of {d} at each rising edge of {control.clock}."
            + formal,
            f"At every rising edge of {control.clock}, {q} becomes {d}.{spoken}",
            f"Store {d} in {q} on the positive edge of {control.clock}.{formal}",
        ),
        summary=f"register, {bits(width)}{control.summary}",
        body=control.always(q, d),
    )


def toggle(rng: Random) -> Design:
    q, control = rng.choice(STATES), _control(rng, must_reset=True)
    formal, spoken = control.sentences(q)
    return Design(
        family="toggle",
        ports=(*control.ports, _state_port(q)),
        behaviours=(
            f"The module should invert {q} at each rising edge of {control.clock}.{formal}",
            f"At every rising edge of {control.clock}, {q} toggles.{spoken}",
        ),
        summary=f"toggle flip-flop{control.summary}",
        body=control.always(q, f"~{q}"),
    )


def counter(rng: Random) -> Design:
    q, width = rng.choice(STATES), rng.choice(WIDTHS[1:])
    control, up = _control(rng, must_reset=True), rng.random() < 0.5
    formal, spoken = control.sentences(q)
    word, verb, operator = ("up", "increases", "+") if up else ("down", "decreases", "-")
    return Design(
        family="counter",
        ports=(*control.ports, _state_port(q, width)),
        behaviours=(
            f"The module should count {word} by one at each rising edge of {control.clock} and wrap around. {q} is the "
            f"count.{formal}",
            f"Implement a {width}-bit counter that counts {word}, with its value on {q}. It wraps around.{formal}",
            f"At every rising edge of {control.clock}, {q} {verb} by 1.{spoken}",
        ),
        summary=f"{word} counter, {bits(width)}{control.summary}",
        body=control.always(q, f"{q} {operator} 1"),
    )


def shift_register(rng: Random) -> Design:
    d, q, width = rng.choice(DATA), rng.choice(STATES), rng.choice(WIDTHS[2:])
    control, left = _control(rng, must_reset=False), rng.random() < 0.5
    formal, spoken = control.sentences(q)
    side, end = ("left", "lowest") if left else ("right", "highest")
    update = f"{{{q}[{width - 2}:0], {d}}}" if left else f"{{{d}, {q}[{width - 1}:1]}}"
    return Design(
        family="shift_register",
        ports=(*control.ports, DesignPort(name=d), _state_port(q, width)),
        behaviours=(
            f"The module should implement a shift register: at each rising edge of {control.clock}, {q} shifts {side} "
            f"by one place and {d} enters at the {end} bit.{formal}",
            f"At every rising edge of {control.clock}, shift {q} {side} and put {d} into its {end} bit.{spoken}",
        ),
        summary=f"shift register {side}, {bits(width)}{control.summary}",
        body=control.always(q, update),
    )


def edge_detector(rng: Random) -> Design:
    d, clock = rng.choice(DATA), rng.choice(CLOCKS)
    y, last = rng.choice(("pulse", "edge_seen", "z", "f")), "last"
    kind, expression = rng.choice([("rising", "{d} & ~{last}"), ("falling", "~{d} & {last}"), ("any", "{d} ^ {last}")])
    edge = "an edge of either kind" if kind == "any" else f"a {kind} edge"
    return Design(
        family="edge_detector",
        ports=(DesignPort(name=clock, role="clock"), DesignPort(name=d), _state_port(y)),
        behaviours=(
            f"The module should detect {edge} of {d}: {y} is 1 for the cycle after {d} made it between two rising "
            f"edges of {clock}, else 0.",
            f"At every rising edge of {clock}, compare {d} with its value at the rising edge before. {y} becomes 1 "
            f"after {edge} of {d}, otherwise 0.",
        ),
        summary=f"edge detector, {kind}",
        body=(
            f"reg {last};",
            f"always @(posedge {clock}) begin",
            f"  {last} <= {d};",
            f"  {y} <= {expression.format(d=d, last=last)};",
            "end",
        ),
    )
