"""The ports of a module, as the compiler sees them, and their roles: clocks, resets, data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma4_tpu.evals.verilog.iverilog import Tools
from gemma4_tpu.evals.verilog.sandbox import Sandbox
from gemma4_tpu.evals.verilog.scan import blank

SOURCE, PROGRAM = "module.sv", "module.vvp"
_PORT = re.compile(r'^\s*\.port_info \d+ /(INPUT|OUTPUT|INOUT) (\d+) "(.*)";$', re.MULTILINE)
_SCOPE = re.compile(r"^S_\w+ \.scope ", re.MULTILINE)
_EVENTS = re.compile(r"@\s*\(([^()]*\b(?:posedge|negedge)\b[^()]*)\)")
_EDGE = re.compile(r"\b(posedge|negedge)\s+(\w+)")
_CLOCK_NAME = re.compile(r"(?i)^(?!.*(?:en|sel|div)).*(?:clk|clock)|^(?:i_|in_)?c[kp]$")
_RESET_NAME = re.compile(r"(?i)rst|reset|clr|clear")
_LOW_NAME = re.compile(r"(?i)(?:rst|reset|clr|clear)_?[nb](?:_|$)|^n_?(?:rst|reset|clr)|_[nb]$")
_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class Port:
    """A port of a module."""

    name: str
    direction: str
    """`INPUT`, `OUTPUT` or `INOUT`."""
    bits: int

    @property
    def written(self) -> str:
        """The name as written in code, escaped if necessary."""
        return self.name if _PLAIN_NAME.fullmatch(self.name) else f"\\{self.name} "


def read_ports(tools: Tools, sandbox: Sandbox, folder: Path, source: str, top: str) -> list[Port] | str:
    """The ports of the module `top` of `source`, in order, or why they are unavailable. Runs in a worker.

    A compiled simulation lists them with their widths, parameters applied.
    """
    (folder / SOURCE).write_text(source, encoding="utf-8", errors="replace")
    done = sandbox.run(tools.build(top, PROGRAM, [SOURCE]), folder, writable=[folder])
    program = folder / PROGRAM
    if done.returncode or not program.is_file():
        return "does not build on its own"
    scopes = _SCOPE.split(program.read_text(encoding="utf-8", errors="replace"))
    found = next((_PORT.findall(scope) for scope in scopes if scope.startswith(f'module, "{top}" "{top}"')), [])
    ports = [Port(name=name, direction=direction, bits=int(bits)) for direction, bits, name in found]
    if not any(port.direction == "OUTPUT" for port in ports):
        return "has no output"
    if both := [port.name for port in ports if port.direction == "INOUT"]:
        return f"has inout ports ({', '.join(both)})"
    return ports


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The roles of a module's inputs, inferred from their names and their use in the reference."""

    clocks: tuple[str, ...]
    """Clock inputs; empty: combinational, or with latches."""
    resets: dict[str, bool]
    """Name → the value that asserts it."""
    data: tuple[str, ...]

    @classmethod
    def of(cls, ports: Sequence[Port], reference: str) -> Roles:
        """The roles of the inputs among `ports`.

        Clocks are the inputs whose edges the reference waits for. If it waits for several at once, the clock is the one
        named like a clock, or else the first, and the others are asynchronous resets. 1-bit inputs named like a reset
        are also resets.
        """
        bare = blank(reference)[0]
        single = [port.name for port in ports if port.direction == "INPUT" and port.bits == 1]
        events = [_EDGE.findall(found) for found in _EVENTS.findall(bare)]
        clocks: set[str] = set()
        asynchronous: dict[str, bool] = {}
        for edges in events:
            names = [name for _, name in edges]
            ticking = [name for name in names if _CLOCK_NAME.search(name)] or names[:1]
            clocks |= {*ticking}
            asynchronous |= {name: edge == "posedge" for edge, name in edges if name not in ticking}
        if events and not clocks & {*single}:  # edges of names inside submodules
            clocks = {name for name in single if _CLOCK_NAME.search(name)}
        resets = {
            name: asynchronous.get(name, not _low(name, bare))
            for name in single
            if name in asynchronous or (_RESET_NAME.search(name) and name not in clocks)
        }
        ticking = [name for name in single if name in clocks and name not in resets]
        data = [p.name for p in ports if p.direction == "INPUT" and p.name not in ticking and p.name not in resets]
        return cls(clocks=tuple(ticking), resets=resets, data=tuple(data))


def _low(name: str, code: str) -> bool:
    """Whether a reset is active low: by its name, or because `code` tests its negation."""
    return bool(_LOW_NAME.search(name) or re.search(rf"\bif\s*\(\s*[!~]\s*{re.escape(name)}\b", code))
