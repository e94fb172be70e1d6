"""What Pallas kernels compute and move, because the compiler does not look inside them.

Splash attention is counted from the blocks that its mask leaves, which is how it skips work; any other kernel by the
estimate that its author gave the compiler (`cost_estimate`), or as unknown if there is none.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gemma4_tpu.planning.hlo import Array, Instruction

TARGET = "tpu_custom_call"
_MATMULS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of [block, head width] blocks: scores and values; scores, their gradient, dq; … dk and dv as well."""
_FUSED_BACKWARD_MATMULS = 5
_SMALL = ("s8", "u8")
_GROUPED = "/jit(gmm)/"
"""In the name of the operation."""
_SCOPE = re.compile(r"\battend_(?:global|window_(\d+))\b")
"""Of `splash.scope`, in the name of the operation."""


@dataclass(frozen=True)
class Mask:
    """Determines which blocks an attention kernel visits; at run time it skips those without two tokens of one
    example.
    """

    window: int | None
    """In tokens; None: everything before."""
    block_q: int
    block_kv: int

    def of_chip(self, queries: int, keys: int) -> float:
        """Number of blocks with unmasked entries among a chip's queries, where it can have more keys than queries.

        In sliding layers, the extra keys precede its queries. In global layers, they are those of the whole row, of
        which every chip processes an equal share (`models/context_parallel.py`).
        """
        if self.window is None:
            return len(self.visited(keys)) * queries / keys
        first = (keys - queries) // self.block_q
        return sum(i >= first for i, _ in self.visited(keys))

    def visited(self, length: int) -> list[tuple[int, int]]:
        """(block of queries, block of keys) with unmasked entries, in a row of `length` tokens."""
        return [
            (i, j)
            for i in range(math.ceil(length / self.block_q))
            for j in range(math.ceil(length / self.block_kv))
            if j * self.block_kv < (i + 1) * self.block_q
            and (self.window is None or i * self.block_q - (j + 1) * self.block_kv + 1 < self.window)
        ]


@dataclass(frozen=True)
class Work:
    """What one call of a kernel does on one chip."""

    flops: float
    bytes: float
    """Read from and written to HBM."""
    mask: Mask | None = None
    """Of an attention kernel."""
    reads_part: bool = False
    """It reads only part of its operands."""


def kernel_work(call: Instruction, operands: list[tuple[Array, ...]]) -> Work | None:
    """The work of a kernel call; None if nothing is known about the kernel."""
    if "splash_m" in call.name or "splash_m" in call.attributes:
        return _splash(call, [arrays[0] for arrays in operands])
    told = re.search(r'"cost_estimate":\{([^}]*)\}', call.attributes)
    if told is None:
        return None
    values = dict(re.findall(r'"(\w+)":"?(\d+)', told[1]))
    flops = float(values.get("flops", 0))
    if _GROUPED in call.op_name:
        return Work(flops, _grouped_bytes(call, operands), reads_part=True)
    boundary = call.bytes + sum(array.bytes for arrays in operands for array in arrays)
    return Work(flops, float(values.get("bytes_accessed", boundary)))


def _grouped_bytes(call: Instruction, operands: list[tuple[Array, ...]]) -> float:
    """HBM bytes of a grouped product (`models/grouped.py`), whose own estimate assumes that a matrix is read again for
    each tile of rows.

    Operands: tables, of which the second is [groups + 1]; rows [N, D]; a stack of matrices, mostly of other layers.
    """
    (offsets, *_), (rows, *_), (stack, *_) = operands[1], operands[-2], operands[-1]
    return call.bytes + rows.bytes + (offsets.elements - 1) * stack.bytes / stack.dims[0]


def _splash(call: Instruction, operands: list[Array]) -> Work | None:
    """Splash attention, forward or backward.

    Operands: block tables as small integers, then q [.., N, T, H], k and v [.., K, keys, H]. Only blocks with unmasked
    entries are visited; in each of them, all products are computed.
    """
    kind = next((kind for kind in _MATMULS if f"_{kind}" in call.name + call.op_name), None)
    scope = _SCOPE.search(call.op_name)
    if kind is None or scope is None:
        return None
    q, k = [array for array in operands if len(array.dims) >= 3 and array.dtype not in _SMALL][:2]
    mask = Mask(int(scope[1]) if scope[1] else None, *_blocks(call, kind))
    block_q, block_kv = mask.block_q, mask.block_kv
    length, width = q.dims[-2:]
    visited = mask.of_chip(length, k.dims[-2])
    # A backward pass in one kernel writes a dq for each block of keys: [kv blocks, N, T, H].
    fused = kind == "dkv" and any(array.dims[-3:] == q.dims[-3:] and len(array.dims) > 3 for array in call.arrays)
    matmuls = _FUSED_BACKWARD_MATMULS if fused else _MATMULS[kind]
    heads = math.prod(q.dims[:-2])
    item = q.bytes / q.elements
    # The stationary side is read once; blocks of the other side are read again for each visit.
    moved = 2 * block_q if kind == "dkv" else 2 * block_kv
    boundary = call.bytes + sum(array.bytes for array in operands)
    moving_once = 2 * (q.bytes if kind == "dkv" else k.bytes)
    traffic = boundary - moving_once + heads * visited * moved * width * item
    return Work(2.0 * matmuls * heads * visited * block_q * block_kv * width, traffic, mask)


def _blocks(call: Instruction, kind: str) -> tuple[int, int]:
    """(tokens in a block of queries, of keys), from the kernel's own metadata."""
    suffix = "" if kind == "fwd" else f"_{kind}"

    def size(name: str) -> int:
        found = re.search(rf'\b{name}{suffix}\\": (\d+)', call.attributes)
        if found is None:
            raise ValueError(f"{call.name}: its metadata names no {name}{suffix}")
        return int(found[1])

    return size("block_q"), size("block_kv")
