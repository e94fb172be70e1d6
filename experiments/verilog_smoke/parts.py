"""What the combinational families share: names, widths, gates and ports."""

from __future__ import annotations

from experiments.verilog_smoke.design import DesignPort

INPUTS = ("a", "b", "c", "d", "x", "w", "u", "v", "in0", "in1", "in2", "in3")
OUTPUTS = ("out", "y", "z", "f", "o")
SELECTS = ("sel", "s", "choice")
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
VECTOR_WIDTHS = WIDTHS[1:]

# Gate → (operator, inverted).
GATES = {
    "AND": ("&", False),
    "OR": ("|", False),
    "XOR": ("^", False),
    "NAND": ("&", True),
    "NOR": ("|", True),
    "XNOR": ("^", True),
}


def bits(width: int) -> str:
    return "1 bit" if width == 1 else f"{width} bits"


def data_in(name: str, width: int = 1) -> DesignPort:
    return DesignPort(name=name, width=width)


def data_out(name: str, width: int = 1, *, reg: bool = False) -> DesignPort:
    return DesignPort(name=name, width=width, output=True, reg=reg)
