"""Packs answers into rows, as training on given answers does, with the additional fields of objectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gemma4_tpu.data.drops import Origin
from gemma4_tpu.data.examples import ExamplesBuilder
from gemma4_tpu.data.packing import pack
from gemma4_tpu.data.pipeline import Assembler, Update
from gemma4_tpu.data.updates import PlannedUpdate
from gemma4_tpu.rollouts.policy_tasks import Task
from gemma4_tpu.rollouts.sampler import Drawn
from gemma4_tpu.step.grpo import ADVANTAGES, COPIES, OLD_LOGPROBS


@dataclass(frozen=True)
class Placed:
    """One answer after its prompt."""

    task: Task
    drawn: Drawn
    advantage: float = 0.0
    copies: int = 1
    """Number of identical answers that it represents."""

    @property
    def slots(self) -> int:
        """Slots that it takes in a packed row."""
        return len(self.task.ids) + len(self.drawn.tokens) - 1


@dataclass(frozen=True)
class BatchShape:
    """The static shape of an update's arrays: M microbatches of B rows of T tokens."""

    microbatches: int
    rows: int
    length: int

    @property
    def capacity(self) -> int:
        """Rows of an update."""
        return self.microbatches * self.rows


def that_fit(groups: Sequence[Sequence[Placed]], shape: BatchShape) -> list[Placed]:
    """The answers of the first groups that fit into an update together; at least some of the first group."""
    chosen: list[Placed] = []
    for group in groups:
        if _rows([*chosen, *group], shape) > shape.capacity:
            break
        chosen += group
    if not chosen:
        for one in groups[0] if groups else ():
            if _rows([*chosen, one], shape) <= shape.capacity:
                chosen.append(one)
    return chosen


def _rows(answers: Sequence[Placed], shape: BatchShape) -> int:
    return len(pack([one.slots for one in answers], shape.length)) if answers else 0


def in_batches(answers: Sequence[Placed], shape: BatchShape) -> Iterator[Update]:
    """Yields all answers, in as many batches as they need."""
    rows = pack([one.slots for one in answers], shape.length)
    for start in range(0, len(rows), shape.capacity):
        part = rows[start : start + shape.capacity]
        places = {index: place for place, index in enumerate(index for row in part for index in row)}
        yield assembled([answers[i] for i in places], shape, 0.0, [[places[i] for i in row] for row in part])


def assembled(
    answers: Sequence[Placed], shape: BatchShape, epoch: float, rows: list[list[int]] | None = None
) -> Update:
    """The arrays [M, B, T] of an update: those of every batch, and `old_logprobs`, `advantages` and `copies`.

    Microbatches are filled in order; those left over contain only padding. `rows`: which answers share a row; None:
    best fit.
    """
    builder = ExamplesBuilder([1.0])
    beside: dict[str, list[np.ndarray]] = {OLD_LOGPROBS: [], ADVANTAGES: [], COPIES: []}
    for one in answers:
        prompt, size = len(one.task.ids), len(one.drawn.tokens)
        flags = np.arange(prompt + size) >= prompt
        origin = Origin(one.task.name, one.drawn.wanted.sample)
        builder.add(np.concatenate([one.task.ids, one.drawn.tokens]), flags, 0, origin)
        nothing = np.zeros(prompt, np.float32)
        beside[OLD_LOGPROBS] += [nothing, one.drawn.logprobs]
        beside[ADVANTAGES] += [nothing, np.full(size, one.advantage, np.float32)]
        beside[COPIES] += [nothing, np.full(size, one.copies, np.float32)]
    flat = {name: np.concatenate(parts) for name, parts in beside.items()}
    examples = replace(builder.build({}), beside=flat)
    assemble = Assembler(examples, shape.capacity, shape.microbatches, None)
    packed = pack(examples.slots, shape.length) if rows is None else rows
    return assemble(PlannedUpdate(shape.length, packed, epoch))
