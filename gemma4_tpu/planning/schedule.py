"""The compiler's schedule of a program: what a chip's core does, in order, and what overlaps with it.

A program compiled to the end is dumped with its instructions in order of their start, and with the compiler's expected
cycles of each fusion (`window_config.estimated_cycles`). `read` parses that text into operations of a few kinds;
`walk.py` assigns times. There are no seconds here, and only plain values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gemma4_tpu.planning import collectives, kernels, origins
from gemma4_tpu.planning.counts import Counting, Counts
from gemma4_tpu.planning.hlo import Computation, Instruction, Module
from gemma4_tpu.planning.links import Grid
from gemma4_tpu.planning.traffic import FREE

BASE, LORA, ATTENTION, GLUE, ELEMENTWISE, OPTIMIZER, COLLECTIVES, COPIES = PARTS = (
    "base_products", "lora", "attention", "attention_glue", "elementwise", "optimizer", "collectives_exposed", "copies",
)  # fmt: skip
"""Parts of a step's time: products with base weights; LoRA's products; attention kernels; sums and reshapes around
them; norms, activations, gathers and the like; the optimizer; collectives that the core waits for; copies between HBM
and on-chip memory that the core waits for.
"""

LOOKED_AT = 40
"""Number of users of a result to search for a name and a source line."""
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_EQUATION = re.compile(r"[a-z]+(?:,[a-z]+)+->[a-z]+")
_ATTENDING = ("attend_", "splash")
_OF_EXPERTS = "experts_lora"
_ROOT = "jit(train)/"
_OPTIMIZER_FILES = ("optax/", "step/optimizer.py")  # plans strip what is before `optax/` (`topology.ENVIRONMENT`)
_BEGIN, _END = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Bytes that leave the core's own memory."""

    hbm_bytes: float = 0.0
    sent_bytes: float = 0.0
    """By a chip, to others."""
    links: float = 0.0
    """Over this many exclusive links; 0: within a chip."""
    lanes: tuple[str, ...] = ()
    """The directions in which these lie, such as `+x`."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation, with exactly one of `body`, `waits_for`, or its own work."""

    name: str
    """Of the instruction."""
    part: str = ELEMENTWISE
    """One of `PARTS`."""
    label: str = ""
    """What it computes: the end of its `op_name`."""
    place: str = ""
    """Source line (`origins.Frames.place`)."""
    cycles: int | None = None
    """Of the core; None: the compiler does not say."""
    kernel_flops: float = 0.0
    """Of a Pallas kernel."""
    mask: kernels.Mask | None = None
    """Of an attention kernel, which skips blocks of this mask without two tokens of one example."""
    transfer: Transfer | None = None
    """Copies and collectives, and the traffic of operations without cycles."""
    starts: str = ""
    """Only starts a transfer, which overlaps with the core under this name."""
    waits_for: str = ""
    """The transfer under this name must have ended."""
    trips: int = 1
    body: tuple[Op, ...] = field(default_factory=tuple)
    """Of a loop, of one round."""


def read(module: Module, frames: origins.Frames, grid: Grid) -> tuple[Op, ...]:
    """The schedule of a module compiled to the end."""
    return tuple(_Reading(module, frames, grid).ops(module.entry))


def plain(ops: Sequence[Op]) -> list[dict[str, Any]]:
    """Plain values, for JSON: what differs from the defaults."""
    return [_plain(op) for op in ops]


def _plain(op: Op) -> dict[str, Any]:
    told = {one.name: getattr(op, one.name) for one in fields(op) if getattr(op, one.name) != one.default}
    for name in ("mask", "transfer"):
        if name in told:
            told[name] = asdict(told[name])
    return {**told, "body": plain(op.body)}


def from_plain(values: Sequence[Mapping[str, Any]]) -> tuple[Op, ...]:
    """The inverse of `plain`."""
    return tuple(_from_plain(dict(value)) for value in values)


def _from_plain(value: dict[str, Any]) -> Op:
    rest = dict(value, body=from_plain(value["body"]))
    if "mask" in value:
        rest["mask"] = kernels.Mask(**value["mask"])
    if "transfer" in value:
        rest["transfer"] = Transfer(**{**value["transfer"], "lanes": tuple(value["transfer"]["lanes"])})
    return Op(**rest)


class _Reading:
    def __init__(self, module: Module, frames: origins.Frames, grid: Grid):
        self.module, self.frames, self.grid = module, frames, grid
        self.counting = Counting(module)

    def ops(self, within: Computation) -> Iterator[Op]:
        computations = self.module.computations
        for one in within.instructions.values():
            if one.opcode == "while":
                body = tuple(self.ops(computations[one.called["body"]]))
                yield Op(name=one.name, trips=self.module.trip_count(one) or 1, body=body)
            elif one.opcode == "conditional":  # the most expensive branch, as in the counts
                dearest = max(one.called.values(), key=lambda name: self.counting.computation(name).flops)
                yield Op(name=one.name, body=tuple(self.ops(computations[dearest])))
            elif one.opcode == "call":
                yield Op(name=one.name, body=tuple(self.ops(computations[one.called["to_apply"]])))
            elif what := self._what(within, one):
                label, place = self._told(within, one)
                yield Op(name=one.name, label=label, place=place, **what)

    def _what(self, within: Computation, one: Instruction) -> dict[str, Any]:
        """What an instruction does, as fields of `Op`; empty if it takes no time."""
        if one.opcode.endswith("-done"):
            return {"waits_for": one.operands[0]}
        if one.opcode == "async-start":  # of a computation that holds one instruction, or on tpu7x a call of one
            inner = self.module.computations[one.called["calls"]]
            counts, inside = self.counting.computation(inner.name), self._collective(inner.instructions[inner.root])
        elif one.opcode in FREE:
            return {}
        else:
            counts, inside = self.counting.instruction(within, one), self._collective(one)
        if inside is not None:
            return self._exchange(within, one, inside, counts)
        if one.opcode in ("copy-start", "async-start"):
            return {"part": COPIES, "starts": one.name, "transfer": Transfer(hbm_bytes=counts.traffic.hbm)}
        return self._work(one, counts)

    def _work(self, one: Instruction, counts: Counts) -> dict[str, Any]:
        """Work of the core itself."""
        part, cycles = self._part(one, counts), _cycles(one)
        if counts.kernel_flops:
            mask = next(iter(counts.attention_flops), None)
            return {"part": part, "kernel_flops": counts.kernel_flops, "mask": mask}
        if cycles is not None:
            return {"part": part, "cycles": cycles}
        if counts.traffic.accessed:
            return {"part": part, "transfer": Transfer(hbm_bytes=counts.traffic.hbm)}
        return {}

    def _exchange(self, within: Computation, one: Instruction, inside: Instruction, counts: Counts) -> dict[str, Any]:
        """A collective: the core waits for it, or it starts and ends alongside, possibly in its own fusions."""
        links, lanes = collectives.over(inside, self.grid, one.attributes)
        sent = sum(counts.collective_bytes.values())
        transfer = Transfer(hbm_bytes=counts.traffic.hbm, sent_bytes=sent, links=links, lanes=lanes)
        last = self._last(one)
        if one.opcode.endswith("-start") or _BEGIN in last:
            return {"part": COLLECTIVES, "starts": one.name, "transfer": transfer}
        if _END in last:
            return {"waits_for": self._origin(within, one.operands[0])}
        if collectives.goes_on(inside):  # passed on by a fusion that does its own work
            return self._work(one, counts)
        return {"part": COLLECTIVES, "transfer": transfer, "cycles": _cycles(one)}

    def _collective(self, one: Instruction) -> Instruction | None:
        """The collective that an instruction is, or that the computation that it fuses or calls holds."""
        if one.opcode.removesuffix("-start") in collectives.KINDS:
            return one
        if one.opcode not in ("fusion", "call"):
            return None
        held = self.module.computations[one.called["calls" if one.opcode == "fusion" else "to_apply"]]
        return next((i for i in held.instructions.values() if i.opcode in collectives.KINDS), None)

    def _last(self, one: Instruction) -> str:
        """Attributes of the last instruction of a fusion."""
        if one.opcode != "fusion":
            return ""
        fused = self.module.computations[one.called["calls"]]
        return fused.instructions[fused.root].attributes

    def _origin(self, within: Computation, name: str) -> str:
        """The fusion that started a collective which others passed on, each as some element of its result."""
        one = within.instructions[name]
        if one.opcode != "get-tuple-element":
            return name
        source, index = within.instructions[one.operands[0]], one.attributes.partition("index=")[2].split(",")[0]
        handed = re.search(rf"\{{{index}\}}: \((\d+),", source.attributes)
        if _BEGIN in self._last(source) or handed is None:
            return source.name
        return self._origin(within, source.operands[int(handed[1])])

    def _told(self, within: Computation, one: Instruction) -> tuple[str, str]:
        """Label and source line; for operations that the compiler added, those of their result's user."""
        takers = list(itertools.islice(_takers(within, one), LOOKED_AT))
        named = next((taker for taker in takers if taker.op_name), one)
        label = named.op_name.removeprefix(_ROOT) or one.opcode
        label = label if named is one else f"{one.opcode} for {label}"
        return label, next((place for taker in takers if (place := self.frames.place(taker.attributes))), "")

    def _part(self, one: Instruction, counts: Counts) -> str:
        name = one.op_name
        attending = bool(counts.attention_flops) or any(word in name for word in _ATTENDING)
        if counts.matmul_flops or counts.kernel_flops:
            if attending:
                return ATTENTION
            # In our equations, r is the adapter's rank and nothing else (`models/weights.py`).
            ranked = (told := _EQUATION.search(name)) and "r" in told[0]
            return LORA if ranked or _OF_EXPERTS in name else BASE
        if attending:
            return GLUE
        if any(word in frame.file for frame in self.frames.of(one.attributes) for word in _OPTIMIZER_FILES):
            return OPTIMIZER
        return ELEMENTWISE


def _cycles(one: Instruction) -> int | None:
    told = _CYCLES.search(one.attributes)
    return int(told[1]) if told else None


def _takers(within: Computation, one: Instruction, steps: int = 4) -> Iterator[Instruction]:
    """Yields an instruction, and the users of its result, direct or passed on a few times."""
    yield one
    if steps:
        for user in within.users.get(one.name, []):
            yield from _takers(within, user, steps - 1)
