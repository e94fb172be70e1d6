"""Assigns times to a schedule: a core that works in order, and separate queues for HBM and for the links.

A queue processes one transfer after another; the core waits where a transfer must have ended. Loops are walked for one
round, times their trip count. Not modelled: that overlapping copies slow down the core's own reads, and that the core
does some of the work of transfers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma4_tpu.planning import calibration
from gemma4_tpu.planning.calibration import ScheduleRates
from gemma4_tpu.planning.kernels import Mask
from gemma4_tpu.planning.schedule import COLLECTIVES, Op, Transfer

HBM = "HBM"
"""The queue of copies between HBM and on-chip memory."""
CORE = "core"


@dataclass(frozen=True)
class Event:
    """An interval on the core or on a queue."""

    row: str
    """`CORE`, `HBM`, or the direction of the links in use."""
    start: float
    end: float
    part: str


def _seconds() -> defaultdict[Any, float]:
    return defaultdict(float)


@dataclass
class Walked:
    """Breakdown of the time of a schedule, or of one round of a loop."""

    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=_seconds)
    """Seconds by part; they add up to `seconds`."""
    hidden: dict[str, float] = field(default_factory=_seconds)
    """Seconds of transfers during which the core did not wait, by part: collectives and copies."""
    operations: dict[tuple[str, str, str], float] = field(default_factory=_seconds)
    """Seconds of the core by (part, label, source line); waits count with what is waited for."""
    times: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """How often each runs."""
    events: list[Event] = field(default_factory=list)
    """Of this level alone; each loop is one interval."""
    own_seconds: float = 0.0
    """Part of `seconds` outside inner loops."""
    rounds: list[tuple[float, Walked]] = field(default_factory=list)
    """(own seconds of all rounds, one round) of each loop, inner ones included."""

    def add(self, other: Walked, times: int) -> None:
        """Adds `times` rounds of a loop."""
        sums: tuple[tuple[Any, Any], ...] = (
            (self.parts, other.parts), (self.hidden, other.hidden), (self.operations, other.operations),
            (self.times, other.times),
        )  # fmt: skip
        for own, more in sums:
            for key, amount in more.items():
                own[key] += amount * times
        self.rounds.append((other.own_seconds * times, other))
        self.rounds += [(seconds * times, one) for seconds, one in other.rounds]


def walk(ops: Sequence[Op], rates: ScheduleRates, visited: Callable[[Mask], float] = lambda mask: 1.0) -> Walked:
    """The time of a schedule.

    Args:
      ops: in order.
      rates: of the chip.
      visited: maps an attention mask to the share of its blocks that a kernel visits.
    """
    return _Walk(rates, visited).run(ops)


class _Walk:
    def __init__(self, rates: ScheduleRates, visited: Callable[[Mask], float]):
        self.rates, self.visited = rates, visited

    def run(self, ops: Iterable[Op]) -> Walked:
        told = Walked()
        free: dict[str, float] = _seconds()  # when each queue becomes free
        under_way: dict[str, tuple[Op, float, float]] = {}  # name → its start, seconds, when it ends
        for op in ops:
            now = told.seconds
            if op.body:
                once = self.run(op.body)
                told.add(once, op.trips)
                told.seconds += once.seconds * op.trips
                told.events.append(Event(CORE, now, told.seconds, "loop"))
            elif op.starts:
                assert op.transfer is not None
                queues = _queues(op.transfer)
                begin = max([now, *(free[queue] for queue in queues)])
                takes = self._transfer(op.transfer, calibration.ASYNCHRONOUS_SECONDS)
                under_way[op.starts] = (op, takes, begin + takes)
                for queue in queues:
                    free[queue] = begin + takes
                    told.events.append(Event(queue, begin, begin + takes, op.part))
            elif op.waits_for:
                if op.waits_for in under_way:
                    start, takes, end = under_way.pop(op.waits_for)
                    waited = max(0.0, end - now)
                    told.hidden[start.part] += max(0.0, takes - waited)
                    self._spend(told, start, waited)
            else:
                self._work(told, op, free)
        return told

    def _work(self, told: Walked, op: Op, free: dict[str, float]) -> None:
        """Work of the core itself; a collective that it waits for has its links to itself."""
        seconds = self._seconds(op)
        if op.transfer is not None and op.part == COLLECTIVES:
            queues = [queue for queue in _queues(op.transfer) if queue != HBM]
            seconds += max([0.0, *(free[queue] - told.seconds for queue in queues)])
            for queue in queues:
                free[queue] = told.seconds + seconds
                told.events.append(Event(queue, told.seconds, free[queue], op.part))
        self._spend(told, op, seconds)

    def _spend(self, told: Walked, op: Op, seconds: float) -> None:
        key = (op.part, op.label, op.place)
        told.times[key] += 1
        if seconds:
            told.events.append(Event(CORE, told.seconds, told.seconds + seconds, op.part))
            told.seconds += seconds
            told.own_seconds += seconds
            told.parts[op.part] += seconds
            told.operations[key] += seconds

    def _seconds(self, op: Op) -> float:
        """Of an operation of the core."""
        if op.kernel_flops:
            share = self.visited(op.mask) if op.mask is not None else 1.0
            return op.kernel_flops * share / self.rates.kernel_flops_per_second
        cycles = (op.cycles or 0) / self.rates.clock_hertz
        if op.transfer is None:
            return cycles
        if not op.transfer.sent_bytes:
            return self._transfer(op.transfer) + calibration.OTHER_SECONDS
        return max(cycles, self._transfer(op.transfer, calibration.SYNCHRONOUS_SECONDS))

    def _transfer(self, transfer: Transfer, before: float = 0.0) -> float:
        hbm = transfer.hbm_bytes / self.rates.hbm_bytes_per_second
        if not transfer.sent_bytes:  # copies follow each other without a gap
            return hbm
        over = transfer.links * self.rates.link_bytes_per_second
        return max(transfer.sent_bytes / over if over else 0.0, hbm) + before


def _queues(transfer: Transfer) -> list[str]:
    """The queues that a transfer occupies: HBM's, or those of its links."""
    return list(transfer.lanes) if transfer.sent_bytes else [HBM]


def slowest_loop(told: Walked) -> Walked:
    """One round of the longest loop, without inner ones: usually a group of layers. Without a loop, everything."""
    return max(told.rounds, key=lambda one: one[0], default=(0.0, told))[1]
