"""FLOPs, bytes and collectives of a compiled program on one chip, corrected for loops and kernels.

XLA's own `cost_analysis` counts the body of a loop once and does not see inside kernels. This walks the optimised
program from its entry and multiplies. Conventions are XLA's: a multiply-add is two FLOPs; an elementwise operation is
one per element; transcendental functions are zero; a fusion reads its operands and writes its results once; of an array
that is only sliced or updated in place, only the slice counts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gemma4_tpu.planning import collectives, kernels
from gemma4_tpu.planning.hlo import Array, Computation, Instruction, Module
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.traffic import Reader, Traffic

_ELEMENTWISE = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "and", "or", "xor", "not", "select",
    "compare", "clamp", "convert", "floor", "ceil", "round-nearest-even", "round-nearest-afz", "sign", "remainder",
    "shift-left", "shift-right-logical", "shift-right-arithmetic", "is-finite",
}  # fmt: skip


@dataclass
class Counts:
    """What one chip does in one run of a program, or of a part of it."""

    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    """Inside Pallas kernels."""
    attention_flops: Counter[kernels.Mask] = field(default_factory=Counter)
    """Part of them, in attention kernels."""
    other_flops: float = 0.0
    """Elementwise operations and reductions."""
    traffic: Traffic = field(default_factory=Traffic)
    read_again: float = 0.0
    """HBM bytes beyond `traffic` that products read again, window by window; known once code is generated."""
    collectives: Counter[str] = field(default_factory=Counter)
    """Number of runs of each kind."""
    collective_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes that a chip sends for each kind, by the usual ring algorithms."""
    link_bytes: Counter[str] = field(default_factory=Counter)
    """Of these, bytes over each of a collective's links (`collectives.over`), by direction."""
    unknown_kernels: Counter[str] = field(default_factory=Counter)
    """Calls of kernels without a known cost, whose FLOPs are missing."""
    unknown_loops: int = 0
    """Loops without a readable trip count, counted once."""
    unknown_groups: Counter[str] = field(default_factory=Counter)
    """Collectives by kind whose groups cannot be read; counted as if all chips took part."""

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.kernel_flops + self.other_flops

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        missing = [
            f"{kind}: {n:g} calls of a kernel without a cost estimate" for kind, n in self.unknown_kernels.items()
        ]
        missing += [f"{self.unknown_loops} loops counted once"] if self.unknown_loops else []
        missing += [f"{kind}: {n:g} taken to be over all chips" for kind, n in self.unknown_groups.items()]
        return {
            "flops": self.flops,
            "matmul_flops": self.matmul_flops,
            "kernel_flops": self.kernel_flops,
            "other_flops": self.other_flops,
            "attention": [{**asdict(mask), "flops": flops} for mask, flops in self.attention_flops.items()],
            "bytes_accessed": self.traffic.accessed,
            "hbm_traffic_bytes": self.traffic.hbm,
            "hbm_read_again_bytes": self.read_again,
            "collectives": {
                kind: {"count": n, "bytes": self.collective_bytes[kind]} for kind, n in sorted(self.collectives.items())
            },
            "link_bytes": dict(self.link_bytes),
            "not_counted": missing,
        }

    def add(self, other: Counts, times: float = 1) -> None:
        """Adds `times` runs of `other`."""
        self.matmul_flops += other.matmul_flops * times
        self.kernel_flops += other.kernel_flops * times
        self.other_flops += other.other_flops * times
        self.traffic += Traffic(other.traffic.accessed * times, other.traffic.hbm * times)
        self.read_again += other.read_again * times
        self.unknown_loops += other.unknown_loops
        for name, own in vars(self).items():
            if isinstance(own, Counter):
                for kind, amount in getattr(other, name).items():
                    own[kind] += amount * times


def count(module: Module, grid: Grid | None = None) -> Counts:
    """Counts a whole program; with the `grid` of its devices, also the traffic over their links."""
    return Counting(module, grid).computation(module.entry.name)


class Counting:
    """Walks each computation once."""

    def __init__(self, module: Module, grid: Grid | None = None):
        self.module = module
        self.grid = grid
        self.reader = Reader(module)
        self.known: dict[str, Counts] = {}
        self.fused: dict[str, Counts] = {}

    def computation(self, name: str, *, inside_fusion: bool = False) -> Counts:
        """Everything in a computation; inside a fusion only arithmetic counts, because traffic counts at its
        boundary.
        """
        known = self.fused if inside_fusion else self.known
        if name not in known:
            total = Counts()
            computation = self.module.computations[name]
            for instruction in computation.instructions.values():
                self._instruction(total, computation, instruction, inside_fusion)
            known[name] = total
        return known[name]

    def instruction(self, within: Computation, one: Instruction) -> Counts:
        """One instruction outside fusions, with everything that it calls."""
        counts = Counts()
        self._instruction(counts, within, one, inside_fusion=False)
        return counts

    def _instruction(self, total: Counts, within: Computation, one: Instruction, inside_fusion: bool) -> None:
        called = one.called
        if one.opcode == "while":
            trips = self.module.trip_count(one)
            total.unknown_loops += trips is None
            for role in ("body", "condition"):
                total.add(self.computation(called[role]), trips or 1)
        elif one.opcode == "conditional":  # the most expensive branch
            total.add(max((self.computation(name) for name in called.values()), key=lambda counts: counts.flops))
        elif one.opcode in ("call", "async-start"):
            total.add(self.computation(called.get("calls") or called["to_apply"]))
        elif one.opcode == "fusion":
            total.add(self._fusion(one))
        elif one.opcode == "dot":
            total.matmul_flops += _dot_flops(one, self._arrays(within, one))
        elif one.opcode == "convolution":
            total.matmul_flops += _convolution_flops(one, self._arrays(within, one))
        elif one.opcode in _ELEMENTWISE:
            total.other_flops += one.arrays[0].elements
        elif one.opcode == "reduce":
            total.other_flops += sum(a.elements for a in self._arrays(within, one)[: len(one.arrays)])
        if (kind := one.opcode.removesuffix("-start")) in collectives.KINDS:
            self._collective(total, kind, one, self._arrays(within, one))
        traffic = Traffic()
        if not inside_fusion:
            traffic = self.reader.traffic(within, one)
            total.read_again += self.reader.read_again(within, one)
        if one.opcode == "custom-call" and f'"{kernels.TARGET}"' in one.attributes:
            work = kernels.kernel_work(one, [within.instructions[name].arrays for name in one.operands])
            if work is None:
                total.unknown_kernels[one.name.rstrip("0123456789.")] += 1
            else:
                total.kernel_flops += work.flops
                if work.mask is not None:
                    total.attention_flops[work.mask] += round(work.flops)
                traffic = Traffic(traffic.accessed, work.bytes if work.reads_part else max(traffic.hbm, work.bytes))
        total.traffic += traffic

    def _fusion(self, one: Instruction) -> Counts:
        """A fusion's arithmetic; an all-reduce of which each chip keeps a slice counts as a reduce-scatter."""
        counts = self.computation(one.called["calls"], inside_fusion=True)
        if counts.collectives["all-reduce"] and collectives.only_sliced(self.module.computations[one.called["calls"]]):
            renamed = Counts()
            renamed.add(counts)
            renamed.collectives["reduce-scatter"] += renamed.collectives.pop("all-reduce")
            renamed.collective_bytes["reduce-scatter"] += renamed.collective_bytes.pop("all-reduce") // 2
            for lane in renamed.link_bytes:
                renamed.link_bytes[lane] //= 2
            return renamed
        return counts

    def _arrays(self, within: Computation, one: Instruction) -> list[Array]:
        return [array for name in one.operands for array in within.instructions[name].arrays]

    def _collective(self, total: Counts, kind: str, one: Instruction, operands: list[Array]) -> None:
        if collectives.goes_on(one):
            return
        size = collectives.group_size(one, self.module.devices)
        if size is None:
            total.unknown_groups[kind] += 1
            size = self.module.devices
        sent = round(collectives.sent_bytes(kind, size, sum(a.bytes for a in operands)))
        total.collectives[kind] += 1
        total.collective_bytes[kind] += sent
        if self.grid is not None:
            links, lanes = collectives.over(one, self.grid)
            for lane in lanes:
                total.link_bytes[lane] += round(sent / links)


def _dot_flops(one: Instruction, operands: list[Array]) -> float:
    contracted = math.prod(operands[0].dims[dim] for dim in one.numbers("lhs_contracting_dims"))
    return 2.0 * one.arrays[0].elements * contracted


def _convolution_flops(one: Instruction, operands: list[Array]) -> float:
    """2 · batch · output features · input features · positions where window and input overlap.

    The TPU compiler writes every matrix product as a convolution, with heads as spatial dims and padding around them;
    products with padding are not computed.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels is not None, one.name
    left, kernel, out = (
        dict(zip(names, array.dims, strict=True))
        for names, array in zip(labels.groups(), (operands[0], operands[1], one.arrays[0]), strict=True)
    )
    window = dict(re.findall(r"(\w+)=([\dx_,-]+)", (re.search(r"window=\{([^}]*)\}", one.attributes) or [""])[0]))
    spatial = [label for label in labels[1] if label.isdecimal()]
    meetings = 1
    for place, label in enumerate(sorted(spatial)):

        def setting(name: str, otherwise: str, place: int = place) -> str:
            return window[name].split("x")[place] if name in window else otherwise

        meetings *= _meetings(
            left[label],
            int(setting("size", "1")),
            out[label],
            int(setting("stride", "1")),
            int(setting("pad", "0_0").split("_")[0]),
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    batch_groups = int((re.search(r"batch_group_count=(\d+)", one.attributes) or ["", "1"])[1])
    return 2.0 * meetings * left["b"] / batch_groups * kernel["i"] * kernel["o"]


def _meetings(length: int, size: int, out: int, stride: int, pad: int, dilation: int, window_dilation: int) -> int:
    """Pairs of an output position and a window position that fall onto an input element."""
    span = (length - 1) * dilation + 1
    if stride == dilation == 1:
        return sum(
            max(0, min(out, span + pad - w * window_dilation) - max(0, pad - w * window_dilation)) for w in range(size)
        )
    places = np.arange(out) * stride - pad
    return sum(
        int(((at >= 0) & (at < span) & (at % dilation == 0)).sum())
        for at in (places + w * window_dilation for w in range(size))
    )
