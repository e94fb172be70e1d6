"""How a bench instantiates a design: ports, parameters, and the time unit."""

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
    """Parameters that an instantiation can override → their bits there (none if not a vector)."""
    overrides: str
    """`#(…)` as in the bench, or empty."""
    constants: tuple[str, ...]
    """Declarations of the names that `overrides` can refer to."""
    named: tuple[str, ...] | None
    """Ports that the bench connects by name; None: by position."""
    precision: int
    """Length of a tick as a power of ten, in seconds."""

    @property
    def inputs(self) -> list[BenchPort]:
        return [port for port in self.ports if not port.output]

    @property
    def outputs(self) -> list[BenchPort]:
        return [port for port in self.ports if port.output]

    @property
    def response_bits(self) -> int:
        """Number of bits in a line of responses."""
        return max(1, sum(port.width for port in self.outputs))

    @property
    def timescale(self) -> str:
        units = ("s", "ms", "us", "ns", "ps", "fs")
        unit, rest = divmod(-self.precision, 3)
        number = "1"
        if rest:
            unit, number = unit + 1, "1" + "0" * (3 - rest)
        return f"`timescale {number}{units[unit]}/{number}{units[unit]}\n"
