"""How a bench instantiates a design: ports, parameters, and the unit of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchPort:
    """A port of the design, as elaborated in the bench."""

    name: str
    width: int
    output: bool

    @property
    def range(self) -> str:
        return f"[{self.width - 1}:0]"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """How a bench instantiates the design."""

    ports: tuple[BenchPort, ...]
    parameters: Mapping[str, str]
    """What an instantiation may override, with the bits that it has there (none, where it is no vector)."""
    overrides: str
    """`#(…)` as the bench has it, or nothing."""
    constants: tuple[str, ...]
    """Declarations of what `overrides` may refer to."""
    named: tuple[str, ...] | None
    """Ports that the bench connects by name; null: by position."""
    precision: int
    """Power of ten of a tick, in seconds."""

    @property
    def inputs(self) -> list[BenchPort]:
        return [port for port in self.ports if not port.output]

    @property
    def outputs(self) -> list[BenchPort]:
        return [port for port in self.ports if port.output]

    @property
    def response_bits(self) -> int:
        """How many bits a line of responses has."""
        return max(1, sum(port.width for port in self.outputs))

    @property
    def timescale(self) -> str:
        units = ("s", "ms", "us", "ns", "ps", "fs")
        unit, rest = divmod(-self.precision, 3)
        number = "1"
        if rest:
            unit, number = unit + 1, "1" + "0" * (3 - rest)
        return f"`timescale {number}{units[unit]}/{number}{units[unit]}\n"
