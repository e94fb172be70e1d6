"""Parses the text of an optimised HLO module: computations, instructions, shapes, and trip counts of loops.

Covers only what counting needs (see `counts.py`), for the text of XLA's CPU and TPU compilers, of JAX 0.10 and 0.11.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

HBM = 0
"""Memory space of HBM in a layout: `S(n)` names others, such as on-chip vector memory; no `S` is HBM."""

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = (.*)$", re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.$-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Array:
    """One array: an instruction's result, or part of it."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * bits(self.dtype) / 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """The result; several for a tuple, flattened."""
    operands: tuple[str, ...]
    attributes: str
    """Everything after the operands; for a constant, its value comes first."""

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @cached_property
    def called(self) -> dict[str, str]:
        """Computations by role: `calls`, `body`, `condition`, `to_apply`, `branch0`, …"""
        found = dict(_CALLED.findall(self.attributes))
        if branches := _BRANCHES.search(self.attributes):
            names = [name.strip().lstrip("%") for name in branches[1].split(",")]
            found |= {f"branch{i}": name for i, name in enumerate(names)}
        return found

    @property
    def op_name(self) -> str:
        """The operation of the traced program that it computes, with its scopes; empty if XLA made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """The list of an attribute such as `lhs_contracting_dims={1}`; empty if not given."""
        found = re.search(rf"\b{key}=\{{([0-9,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(i.attributes.partition(")")[0]): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each result."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


@dataclass(frozen=True)
class Module:
    """A compiled program, as one device runs it."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int
    """Partitions that the program is compiled for."""

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None if its text does not say.

        CPU programs state it; TPU programs compare a counter, which starts at 0, with a constant.
        """
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if told:
            return int(told[1])
        condition = self.computations[loop.called["condition"]]
        limits = [
            int(i.attributes.partition(")")[0])
            for i in condition.instructions.values()
            if i.opcode == "constant" and i.arrays[0].dtype in ("s32", "u32", "s64", "u64")
        ]
        compared = self._all(condition, "compare")
        if len(limits) != 1 or len(compared) != 1 or "direction=LT" not in compared[0].attributes:
            return None
        return limits[0]

    def _all(self, computation: Computation, opcode: str) -> list[Instruction]:
        """Instructions of this kind, including those inside fusions."""
        found = []
        for instruction in computation.instructions.values():
            found += [instruction] if instruction.opcode == opcode else []
            if instruction.opcode == "fusion":
                found += self._all(self.computations[instruction.called["calls"]], opcode)
        return found


def bits(dtype: str) -> int:
    """Bits of one element: 16 for `bf16`, 8 for `pred` and `f8e4m3fn`, 0 for `token`."""
    if dtype == "pred":
        return 8
    number = re.match(r"[a-z]+(\d+)", dtype)
    return int(number[1]) if number else 0


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` prints.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = None
    name, is_entry = "", False
    lines: list[str] = []
    for line in text.splitlines():
        if not name:
            header = _HEADER.match(line)
            if header:
                name, is_entry, lines = header[2], bool(header[1]), []
        elif line == "}" or line.startswith("}, execution_thread="):
            computations[name] = _computation(name, lines)
            entry = name if is_entry else entry
            name = ""
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # attributes can contain line breaks
            lines[-1] += "\n" + line
    if entry is None:
        raise ValueError("no ENTRY computation in the HLO text")
    partitions = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
    return Module(computations, computations[entry], int(partitions[1]) if partitions else 1)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        found = _INSTRUCTION.match(line)
        assert found is not None
        instruction = _instruction(found[2], found[3])
        instructions[instruction.name] = instruction
        root = instruction.name if found[1] else root
    return Computation(name, instructions, root)


def _instruction(name: str, text: str) -> Instruction:
    """`SHAPE opcode(operands), attributes`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    if opcode in ("parameter", "constant"):
        operands, attributes = (), f"{inside}){rest[stop + 1 :]}"
    else:
        operands = tuple(re.findall(r"%([\w.$-]+)", _COMMENT.sub("", inside)))
        attributes = rest[stop + 1 :].lstrip(", ")
    return Instruction(name, opcode, _arrays(shape), operands, attributes)


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), _space(layout))
        for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub("", shape))
    )


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout or "")
    return int(found[1]) if found else HBM


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` is closed."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in _OPENING:
            depth += 1
        elif text[place] in _CLOSING:
            depth -= 1
            if not depth:
                return place
    raise ValueError(f"a bracket is not closed in HLO text: {text[start : start + 80]}")
