"""The compiler's schedule of a program: what a chip's core does, in order, and what runs beside it.

A program that is compiled to the end is written down with its instructions in the order in which they start, and with
the cycles that the compiler expects of each fusion (`window_config.estimated_cycles`). `read` turns that text into
operations of a few kinds; `walk.py` gives them time. No seconds here, and plain values only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from gemma4_tpu.planning import collectives, kernels, source
from gemma4_tpu.planning.counts import Counting, Counts
from gemma4_tpu.planning.hlo import Computation, Instruction, Module
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.traffic import FREE

BASE, LORA, ATTENTION, GLUE, ELEMENTWISE, OPTIMIZER, COLLECTIVES, COPIES = PARTS = (
    "base_products", "lora", "attention", "attention_glue", "elementwise", "optimizer", "collectives_exposed", "copies",
)  # fmt: skip
"""What a step's time goes to: products with base weights; LoRA's products; attention kernels; what is summed and
reshaped around them; norms, activations, gathers and the like; the optimizer; collectives, and copies between HBM and
on-chip memory, that the core waits for."""

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_COLORS = re.compile(r"color_count: (\d+)")
_EQUATION = re.compile(r"[a-z]+(?:,[a-z]+)+->[a-z]+")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPTIMIZER_FILES = ("/optax/", "step/optimizer.py")
_BEGIN, _END = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Bytes that leave the core's own memory."""

    hbm_bytes: float = 0.0
    sent_bytes: float = 0.0
    """By a chip, to others."""
    links: float = 0.0
    """Over so many links of its own; 0: within a chip."""
    axes: str = ""
    """The grid's dimensions along which these lie."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation. Exactly one of `body`, `waits_for`, or what it does itself."""

    name: str
    """Of the instruction."""
    part: str = ELEMENTWISE
    """One of `PARTS`."""
    label: str = ""
    """What it computes: the end of its `op_name`."""
    place: str = ""
    """Where in our source (`source.Frames.place`)."""
    cycles: int | None = None
    """Of the core; None: the compiler does not say."""
    kernel_flops: float = 0.0
    """Of a Pallas kernel."""
    mask: kernels.Mask | None = None
    """Of an attention kernel: of what its mask leaves it skips what has no common example."""
    transfer: Transfer | None = None
    """Copies and collectives, and the traffic of what has no cycles."""
    starts: str = ""
    """It only starts its transfer, which runs beside the core under this name."""
    waits_for: str = ""
    """The transfer under this name must have ended."""
    trips: int = 1
    body: tuple[Op, ...] = field(default_factory=tuple)
    """Of a loop, of one round."""


def read(module: Module, frames: source.Frames, grid: Grid) -> tuple[Op, ...]:
    """The schedule of a module that was compiled to the end."""
    return tuple(_Reading(module, frames, grid).ops(module.entry))


class _Reading:
    def __init__(self, module: Module, frames: source.Frames, grid: Grid):
        self.module, self.frames, self.grid = module, frames, grid
        self.counting = Counting(module)

    def ops(self, within: Computation) -> Iterator[Op]:
        for one in within.instructions.values():
            if one.opcode == "while":
                body = tuple(self.ops(self.module.computations[one.called["body"]]))
                yield Op(name=one.name, trips=self.module.trip_count(one) or 1, body=body)
            elif one.opcode == "conditional":  # the dearest branch, as it is counted
                dearest = max(one.called.values(), key=lambda name: self.counting.computation(name).flops)
                yield Op(name=one.name, body=tuple(self.ops(self.module.computations[dearest])))
            elif one.opcode == "call":
                yield Op(name=one.name, body=tuple(self.ops(self.module.computations[one.called["to_apply"]])))
            elif (op := self._op(within, one)) is not None:
                yield op

    def _op(self, within: Computation, one: Instruction) -> Op | None:
        """None: it takes no time."""
        if one.opcode == "async-start":
            return self._wrapped(one)
        if one.opcode.endswith("-done"):
            copies = not one.opcode.removesuffix("-done") in collectives.KINDS
            part = COPIES if copies and not self._collective_of(within, one) else COLLECTIVES
            return self._described(one, part, waits_for=one.operands[0])
        if one.opcode in FREE:
            return None
        counts = self.counting.instruction(within, one)
        if one.opcode == "copy-start":
            return self._described(one, COPIES, starts=one.name, transfer=Transfer(hbm_bytes=counts.traffic.hbm))
        inside = self._collective(one)
        if inside is not None:
            return self._exchange(one, inside, counts)
        if not (_CYCLES.search(one.attributes) or counts.kernel_flops or counts.traffic.accessed):
            return None
        return self._described(one, self._part(one, counts), **self._work(one, counts))

    def _work(self, one: Instruction, counts: Counts) -> dict:
        cycles = _CYCLES.search(one.attributes)
        if counts.kernel_flops:
            mask = next(iter(counts.attention_flops), None)
            return {"kernel_flops": counts.kernel_flops, "mask": mask}
        if cycles:
            return {"cycles": int(cycles[1])}
        return {"transfer": Transfer(hbm_bytes=counts.traffic.hbm)}

    def _described(self, one: Instruction, part: str, **what: object) -> Op:
        named = _OP_NAME.search(one.attributes)
        label = named[1].rpartition("jit(train)/")[2] if named else one.opcode
        return Op(name=one.name, part=part, label=label, place=self.frames.place(one.attributes), **what)  # type: ignore[arg-type]

    # ── collectives ────────────────────────────────────────────────────────────────────────────────────────────────

    def _collective(self, one: Instruction) -> Instruction | None:
        """The collective that an instruction is, or that its fused computation holds."""
        if one.opcode.removesuffix("-start") in collectives.KINDS:
            return one
        if one.opcode != "fusion":
            return None
        fused = self.module.computations[one.called["calls"]]
        return next((i for i in fused.instructions.values() if i.opcode in collectives.KINDS), None)

    def _exchange(self, one: Instruction, inside: Instruction, counts: Counts) -> Op:
        """A collective: the core waits for it, or it starts and ends beside it, perhaps in fusions of its own."""
        sent = sum(counts.collective_bytes.values())
        transfer = Transfer(hbm_bytes=counts.traffic.hbm, sent_bytes=sent, **self._links(one, inside))
        if one.opcode.endswith("-start"):
            return self._described(one, COLLECTIVES, starts=one.name, transfer=transfer)
        channel = f"channel {told[1]}" if (told := _CHANNEL.search(inside.attributes)) else one.name
        last = self._last(one)
        if _BEGIN in last:
            return self._described(one, COLLECTIVES, starts=channel, transfer=transfer)
        if _END in last:
            return self._described(one, COLLECTIVES, waits_for=channel)
        if collectives.goes_on(inside):  # handed on by a fusion that does work of its own
            return self._described(one, self._part(one, counts), **self._work(one, counts))
        cycles = _CYCLES.search(one.attributes)
        return self._described(one, COLLECTIVES, transfer=transfer, cycles=int(cycles[1]) if cycles else None)

    def _last(self, one: Instruction) -> str:
        if one.opcode != "fusion":
            return ""
        fused = self.module.computations[one.called["calls"]]
        return fused.instructions[fused.root].attributes

    def _wrapped(self, one: Instruction) -> Op:
        """`async-start` of a computation that holds one instruction: a slice that is copied, or a collective."""
        within = self.module.computations[one.called["calls"]]
        root = within.instructions[within.root]
        counts = self.counting.computation(within.name)
        if (inside := self._collective(root)) is not None:
            sent = sum(counts.collective_bytes.values())
            transfer = Transfer(hbm_bytes=counts.traffic.hbm, sent_bytes=sent, **self._links(root, inside))
            return self._described(one, COLLECTIVES, starts=one.name, transfer=transfer)
        return self._described(one, COPIES, starts=one.name, transfer=Transfer(hbm_bytes=counts.traffic.hbm))

    def _collective_of(self, within: Computation, done: Instruction) -> bool:
        """Whether an `async-done` ends a collective."""
        start = within.instructions[done.operands[0]]
        if start.opcode != "async-start":
            return False
        inner = self.module.computations[start.called["calls"]]
        return self._collective(inner.instructions[inner.root]) is not None

    def _links(self, one: Instruction, inside: Instruction) -> dict:
        devices = len(self.grid.places)
        groups = collectives.groups(inside, devices) or [tuple(range(devices))]
        members = [device for group in groups for device in group] if "pairs=" in inside.attributes else groups[0]
        axes = self.grid.axes(members)
        if "source_target_pairs=" in inside.attributes:
            steps = self.grid.steps(groups)
            return {"links": 1 / steps if steps else 0.0, "axes": axes}
        colors = _COLORS.search(one.attributes)  # rings at a time, each with links of its own
        links = min(self.grid.links(group) for group in groups)
        return {"links": links * (int(colors[1]) if colors else 1), "axes": axes}

    # ── what time goes to ──────────────────────────────────────────────────────────────────────────────────────────

    def _part(self, one: Instruction, counts: Counts) -> str:
        named = _OP_NAME.search(one.attributes)
        name = named[1] if named else ""
        if counts.attention_flops:
            return ATTENTION
        attending = "attend_" in name or "splash" in name
        if counts.matmul_flops or counts.kernel_flops:
            if attending:
                return ATTENTION
            # In our equations r is the adapter's rank and nothing else (`models/gemma4.py`).
            return LORA if (told := _EQUATION.search(name)) and "r" in told[0] else BASE
        if attending:
            return GLUE
        if any(word in frame.file for frame in self.frames.of(one.attributes) for word in _OPTIMIZER_FILES):
            return OPTIMIZER
        return ELEMENTWISE
