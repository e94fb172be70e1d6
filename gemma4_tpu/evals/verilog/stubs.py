"""Designs that do nothing: a bench that passes one of them tests nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gemma4_tpu.evals.verilog.ports import Port

EMPTY, ZEROS, ONES, UNKNOWN, THROUGH = "empty (Z)", "constant 0", "constant 1", "X", "pass-through"


def stubs(top: str, ports: Sequence[Port]) -> dict[str, str]:
    """Name → source of each stub with the module name and the ports of the reference."""
    inputs = [port for port in ports if port.direction == "INPUT"]
    return {
        EMPTY: _module(top, ports, None),
        ZEROS: _module(top, ports, lambda port: f"{{{port.bits}{{1'b0}}}}"),
        ONES: _module(top, ports, lambda port: f"{{{port.bits}{{1'b1}}}}"),
        UNKNOWN: _module(top, ports, lambda port: f"{{{port.bits}{{1'bx}}}}"),
        **({THROUGH: _module(top, ports, lambda port: _nearest(port, inputs).written)} if inputs else {}),
    }


def _module(top: str, ports: Sequence[Port], value: Callable[[Port], str] | None) -> str:
    heads = [f"  {port.direction.lower()} [{port.bits - 1}:0] {port.written}" for port in ports]
    driven = [f"  assign {port.written} = {value(port)};" for port in ports if value and port.direction == "OUTPUT"]
    return "\n".join([f"module {top} (", ",\n".join(heads), ");", *driven, "endmodule\n"])


def _nearest(output: Port, inputs: Sequence[Port]) -> Port:
    """The input closest in width, and the last of several, because a clock usually comes first."""
    return min(reversed(inputs), key=lambda port: abs(port.bits - output.bits))
