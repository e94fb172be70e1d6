"""Bytes that instructions of a compiled program read and write, and those that a product's windows read again."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gemma4_tpu.planning import collectives, kernels
from gemma4_tpu.planning.hlo import HBM, Array, Computation, Instruction, Module

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "while", "conditional", "call", "copy-done", "async-start", "async-done", "async-update", "domain",
    "add-dependency",
}  # fmt: skip
"""Operations that move no data."""
_IN_PLACE = ("dynamic-update-slice", "scatter")
SLICES = ("dynamic-slice", "slice", "gather")
_PASSING_ON = ("bitcast", "copy")
"""In a fusion, these read what is read of their result."""
_WINDOWS = re.compile(r'"iteration_bounds":\[([\d",]*)\]')


@dataclass(frozen=True)
class Traffic:
    """Bytes that an instruction reads and writes."""

    accessed: float = 0.0
    """In any memory."""
    hbm: float = 0.0
    """Of these, in HBM: the compiler keeps some arrays in on-chip memory."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.accessed + other.accessed, self.hbm + other.hbm)


def moved(array: Array, size: float) -> Traffic:
    """So many bytes of an array."""
    return Traffic(size, size if array.space == HBM else 0.0)


class Reader:
    """Reads the traffic of a module's instructions."""

    def __init__(self, module: Module):
        self.module = module

    def traffic(self, within: Computation, one: Instruction) -> Traffic:
        """What one instruction outside fusions reads and writes."""
        if one.opcode in FREE or one.opcode.endswith("-done"):
            return Traffic()
        if one.opcode == "custom-call" and f'"{kernels.TARGET}"' not in one.attributes:
            return Traffic()  # allocations and annotations
        if one.opcode == "copy-start":
            target, source = one.arrays[:2]
            return moved(target, target.bytes) + moved(source, source.bytes)
        operands = [within.instructions[name] for name in one.operands]
        if one.opcode == "fusion":
            fused = self.module.computations[one.called["calls"]]
            own_operands, own_results = collectives.own_of_fusion(one)
            total = Traffic()
            for number in range(len(operands))[own_operands]:
                total += moved(operands[number].arrays[0], self._read(fused, fused.parameters[number]))
            written = self._written(fused, fused.instructions[fused.root])
            for array, size in list(zip(one.arrays, written, strict=True))[own_results]:
                total += moved(array, size)
            return total
        arrays = [array for operand in operands for array in operand.arrays]
        results = one.arrays[len(arrays) :] if one.opcode.endswith("-start") else one.arrays
        if one.opcode.removesuffix("-start") in SLICES:
            return moved(arrays[0], results[0].bytes) + moved(results[0], results[0].bytes)
        if one.opcode in _IN_PLACE:
            update = arrays[-1] if one.opcode == "scatter" else arrays[1]
            return moved(update, update.bytes) + moved(one.arrays[0], update.bytes)
        total = Traffic()
        for array in (*arrays, *results):
            total += moved(array, array.bytes)
        return total

    def read_again(self, within: Computation, one: Instruction) -> float:
        """HBM bytes that a product reads more than once, because its operands pass through on-chip memory window by
        window.

        `iteration_bounds` are windows over the output's features, its rows and the contracted dim, innermost last. The
        rows' operand is read again for each window of features, and the features' operand for each window of rows if
        the contracted dim has several. Only known after code generation; products with more dims (heads) give no such
        order, and count once.
        """
        told = _WINDOWS.search(one.attributes) if one.opcode == "fusion" else None
        bounds = [int(n) for n in re.findall(r"\d+", told[1])] if told else []
        if len(bounds) != 3 or math.prod(bounds) == 1:
            return 0.0
        found = self._product(self.module.computations[one.called["calls"]])
        if found is None:
            return 0.0
        fused, product = found
        features, rows, contracted = bounds
        times = (features if rows * contracted > 1 else 1, rows if contracted > 1 else 1)
        total = 0.0
        for name, again in zip(product.operands, times, strict=False):
            sources = _reached(fused, name) if again > 1 else set()
            for number, parameter in fused.parameters.items():
                array = within.instructions[one.operands[number]].arrays[0]
                if parameter.name in sources and array.space == HBM:
                    total += (again - 1) * self._read(fused, parameter)
        return total

    def _product(self, fused: Computation) -> tuple[Computation, Instruction] | None:
        """The first matrix product of a fused computation itself."""
        return next(((fused, i) for i in fused.instructions.values() if i.opcode in ("convolution", "dot")), None)

    def _read(self, computation: Computation, value: Instruction) -> float:
        """Bytes of `value`, a parameter of a fused computation, that are accessed there."""
        touched = value.bytes if value.name == computation.root else 0.0  # passed on whole
        for user in computation.users.get(value.name, []):
            if user.opcode in SLICES and user.operands[0] == value.name:
                touched += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue
            elif user.opcode in _PASSING_ON or self._passes_on(user):
                touched += self._read(computation, user)
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called["calls"]]
                places = [i for i, name in enumerate(user.operands) if name == value.name]
                touched += sum(self._read(inner, inner.parameters[place]) for place in places)
            else:
                return value.bytes
        return min(touched, value.bytes)

    def _passes_on(self, one: Instruction) -> bool:
        """Whether this is a fusion that only copies, as on tpu7x before a slice."""
        if one.opcode != "fusion":
            return False
        inner = self.module.computations[one.called["calls"]].instructions.values()
        return {each.opcode for each in inner} <= {"parameter", *_PASSING_ON}

    def _written(self, computation: Computation, root: Instruction) -> list[float]:
        """Bytes written for each array of a fused computation's result."""
        if root.opcode == "tuple":
            return [
                size for name in root.operands for size in self._written(computation, computation.instructions[name])
            ]
        if root.opcode == "bitcast":
            return self._written(computation, computation.instructions[root.operands[0]])
        if root.opcode == "dynamic-update-slice":
            return [computation.instructions[root.operands[1]].bytes]
        if root.opcode == "scatter":
            return [computation.instructions[root.operands[-1]].bytes]
        if root.opcode == "fusion":
            inner = self.module.computations[root.called["calls"]]
            return self._written(inner, inner.instructions[inner.root])
        return [array.bytes for array in root.arrays]


def _reached(computation: Computation, name: str) -> set[str]:
    """Everything that a value is computed from, itself included."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += computation.instructions[one].operands
    return seen
