"""Collectives in the text of a compiled program: who takes part, what a chip sends, and where one counts.

The TPU compiler may let a collective run beside products: it starts in one fusion, is handed on through others, and
ends in a last one, each of which repeats its line.
"""

from __future__ import annotations

import math
import re

from gemma4_tpu.planning.hlo import Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(?!-1)')
_CONTINUATION = re.compile(
    r'"continuation_config":\{"output_tuple_original_start":"(\d+)","output_tuple_original_end":"(\d+)",'
    r'"operand_original_start":"(\d+)","operand_original_end":"(\d+)"'
)


def goes_on(one: Instruction) -> bool:
    """Whether this line repeats a collective that started in an earlier fusion."""
    return _PIECE.search(one.attributes) is not None


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
    """Chips that take part; None where the text says it in a way that we don't know.

    We know pairs, `{}` (all), lists, `[groups,size]<=[…]`, and `mesh[…] {axes}` with or without `device_ids`.
    """
    text = one.attributes
    if "source_target_pairs=" in text or "replica_groups={}" in text:
        return devices
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{}]*\))? ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return None


def own_of_fusion(one: Instruction) -> tuple[slice, slice]:
    """Which operands and results a fusion works on itself, not handing on a collective that runs beside it.

    The arrays of such a collective count where it starts: `(operand, result, …)`, the operand in its own place.
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
