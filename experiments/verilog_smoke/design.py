"""A drawn design, its module text, and the problem (specification, reference, test bench) that is made from it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

MODULE_NAME = "TopModule"


@dataclass(frozen=True, kw_only=True)
class DesignPort:
    """A port of the module. `role` steers the test bench's stimulus:
    `data`, `clock`, `reset` (asserted at 1), `reset_low` (asserted at 0) or `enable`.
    """

    name: str
    width: int = 1
    output: bool = False
    reg: bool = False
    role: str = "data"

    @property
    def declaration(self) -> str:
        words = ["output" if self.output else "input"]
        if self.reg:
            words.append("reg")
        if self.width > 1:
            words.append(f"[{self.width - 1}:0]")
        return " ".join([*words, self.name])


@dataclass(frozen=True, kw_only=True)
class Design:
    """One draw from a family: ports, behaviour and the body that implements it."""

    family: str
    ports: tuple[DesignPort, ...]
    behaviours: tuple[str, ...]
    """Equivalent statements of the behaviour, each complete: a prompt uses one of them."""
    summary: str
    """The terse form that a code comment would have; prompts never use it."""
    body: tuple[str, ...]
    """Lines between the port list and `endmodule`."""

    def module(self, name: str = MODULE_NAME) -> str:
        """The Verilog text of the module."""
        ports = ",\n".join(f"  {port.declaration}" for port in self.ports)
        body = "\n".join(f"  {line}" for line in self.body)
        return f"module {name} (\n{ports}\n);\n{body}\nendmodule\n"

    @property
    def inputs(self) -> tuple[DesignPort, ...]:
        return tuple(port for port in self.ports if not port.output)

    @property
    def outputs(self) -> tuple[DesignPort, ...]:
        return tuple(port for port in self.ports if port.output)

    @property
    def clock(self) -> DesignPort | None:
        return next((port for port in self.ports if port.role == "clock"), None)

    def bucket(self, buckets: int) -> int:
        """A stable number below `buckets` that depends on the module alone: equal parameters share a bucket."""
        return int.from_bytes(hashlib.sha256(self.module().encode()).digest()[:8], "big") % buckets


@dataclass(frozen=True, kw_only=True)
class MadeProblem:
    """A specification, the module that fulfils it, and a self-checking test bench.

    `reference` defines `TopModule`. `testbench` instantiates `TopModule` and the reference under the name `RefModule`,
    and prints `Mismatches: E in N samples` at its end.
    """

    id: str
    family: str
    prompt: str
    reference: str
    testbench: str

    def to_row(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, str]) -> MadeProblem:
        return cls(**row)
