"""Collectives in the text of a compiled program: their participants, the bytes that a chip sends, and where each
counts.

The TPU compiler can overlap a collective with products: it starts in one fusion, is passed on through others, and ends
in a last one, each of which repeats its line.
"""

from __future__ import annotations

import math
import re

import numpy as np

from gemma4_tpu.planning.hlo import Computation, Instruction
from gemma4_tpu.planning.links import RING, Grid

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(?!-1)')
_ONE_RING = re.compile(r'"emitter":"1D|"strategy":"(?:StrategyRing|UniDirection1D)')
_CONTINUATION = re.compile(
    r'"continuation_config":\{"output_tuple_original_start":"(\d+)","output_tuple_original_end":"(\d+)",'
    r'"operand_original_start":"(\d+)","operand_original_end":"(\d+)"'
)


def goes_on(one: Instruction) -> bool:
    """Whether this line continues a collective that started in an earlier fusion."""
    return _PIECE.search(one.attributes) is not None


def only_sliced(fused: Computation) -> bool:
    """Whether each chip keeps only a slice of what a fused computation's all-reduces add up.

    The TPU compiler writes a reduce-scatter in this way: `%fusion = … calls=%all-reduce-scatter`, an all-reduce
    followed by slices.
    """
    sums = [one for one in fused.instructions.values() if one.opcode == "all-reduce"]
    return bool(sums) and all(_sliced(fused, one) for one in sums)


def _sliced(fused: Computation, value: Instruction) -> bool:
    users = fused.users.get(value.name, [])
    return bool(users) and all(
        user.opcode == "dynamic-slice" or (user.opcode in ("get-tuple-element", "bitcast") and _sliced(fused, user))
        for user in users
    )


def sent_bytes(kind: str, size: int, given: float) -> float:
    """Bytes that a chip sends, by the usual ring algorithms.

    Args:
      kind: one of `KINDS`.
      size: chips that take part.
      given: bytes of the operands on one chip.
    """
    share = (size - 1) / size
    return {
        "all-reduce": 2 * share * given,
        "all-gather": (size - 1) * given,
        "reduce-scatter": share * given,
        "all-to-all": share * given,
        "ragged-all-to-all": share * given,
        "collective-permute": given,
    }[kind]


def group_size(one: Instruction, devices: int) -> int | None:
    """Chips in one group; None if the text uses an unknown notation."""
    found = groups(one, devices)
    return None if found is None else devices if "source_target_pairs=" in one.attributes else len(found[0])


def groups(one: Instruction, devices: int) -> list[tuple[int, ...]] | None:
    """The groups that exchange data, by device number; None if the text uses an unknown notation.

    Known are pairs, `{}` (all), lists, `[groups,size]<=[…]T(…)`, and `mesh[…] {axes}` with or without `device_ids`.
    """
    text = one.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if "replica_groups={}" in text:
        return [tuple(range(devices))]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", text):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _tuples(_tiled(iota[3]).reshape(int(iota[1]), int(iota[2])))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{}]*)\))? ?\{([^}]*)\}", text):
        return _mesh_groups(*mesh.groups())
    return None


def over(one: Instruction, grid: Grid, algorithm: str = "") -> tuple[float, tuple[str, ...]]:
    """(exclusive links over which each chip sends, their directions) of a collective.

    Args:
      one: the collective.
      grid: the devices' positions.
      algorithm: attributes with `collective_algorithm_config`, known once code is generated: one ring uses two links of
        a chip, multi-dimensional algorithms use all links between the group's chips.
    """
    devices = len(grid.places)
    told = groups(one, devices) or [tuple(range(devices))]
    if "source_target_pairs=" in one.attributes:
        return grid.permuted(told)
    most = RING if _ONE_RING.search(algorithm) else None
    return min(grid.links(group, most) for group in told), grid.lanes(min(told))


def _tiled(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the devices in order, in this shape, transposed."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    dims = [int(n) for n in found[1].split(",")]
    order = np.arange(math.prod(dims)).reshape(dims)
    return order.transpose([int(n) for n in found[2].split(",")]) if found[2] else order


def _mesh_groups(sizes: str, device_ids: str | None, axes: str) -> list[tuple[int, ...]]:
    """Groups along axes of a mesh; `'a':(2)4` is part of an axis: of what follows the first 2, the next 4."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    asked = {name: (int(before or 1), int(part or shape[name]))
             for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}  # fmt: skip
    dims: list[int] = []
    grouped: dict[str, int] = {}
    for name, size in shape.items():
        before, part = asked.get(name, (1, 1))
        if name in asked:
            grouped[name] = len(dims) + 1
        dims += [before, part, size // before // part]
    order = _tiled(device_ids) if device_ids else np.arange(math.prod(dims))
    last = [grouped[name] for name in asked]
    moved = order.reshape(dims).transpose([*(d for d in range(len(dims)) if d not in last), *last])
    return _tuples(moved.reshape(-1, math.prod(dims[d] for d in last)))


def _tuples(rows: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in row) for row in rows]


def own_of_fusion(one: Instruction) -> tuple[slice, slice]:
    """The operands and results on which a fusion works itself, excluding those of a collective that it passes on.

    The arrays of such a collective count where it starts: `(operand, result, …)`, with the operand in its own place.
    """
    if one.name.startswith("async-collective-start"):
        return slice(None), slice(1, None)
    if one.name.startswith("async-collective-done"):
        return slice(0), slice(0)
    told = _CONTINUATION.search(one.attributes)
    if told is None:
        return slice(None), slice(None)
    first_result, last_result, first_operand, last_operand = map(int, told.groups())
    return slice(first_operand, last_operand + 1), slice(first_result, last_result + 1)
