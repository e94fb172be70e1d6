"""Searches meshes × remat policies × rows of a slice: compiles every candidate and selects those worth considering.

First all are compiled until memory is assigned; then those with the best rooflines are compiled to the end, with each
set of compiler flags, and ranked by the compiler's schedule.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from gemma4_tpu.config.machines import MeshConfig
from gemma4_tpu.config.tasks import PlanConfig, PlanRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.planning.attempt import attempted, result_of, start
from gemma4_tpu.planning.auto_remat import AUTO, POLICIES
from gemma4_tpu.planning.checks import examine_plan
from gemma4_tpu.planning.compilation import Compilation
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.planned import Planned
from gemma4_tpu.training.meshes import legal_meshes, resolve_mesh, row_splits

log = logging.getLogger(__name__)
COMPILATION_BYTES = 6 * 2**30
"""Memory of this machine that one compilation of a large model can take."""


@dataclass(frozen=True)
class Candidate:
    """One point of the grid."""

    planned: Planned
    rows: int
    """Rows per place on the axes dp and fsdp and per microbatch."""

    @property
    def overrides(self) -> tuple[str, ...]:
        config = self.planned.config
        return (
            *self.planned.checked.mesh.overrides,
            f"trainer.remat={config.trainer.remat}",
            f"trainer.global_batch_sequences={config.trainer.global_batch_sequences}",
        )

    def needs_more_than(self, other: Candidate) -> bool:
        """Whether it certainly needs more: no more sharding of weights or tokens, no more remat, no fewer rows."""
        mesh, others = self.planned.checked.mesh, other.planned.checked.mesh
        same = mesh.tp == others.tp and self.planned.config.trainer.remat == other.planned.config.trainer.remat
        return same and mesh.fsdp <= others.fsdp and mesh.cp <= others.cp and self.rows >= other.rows


@dataclass
class Found:
    """Results of a search; `search.json`."""

    results: list[dict[str, Any]] = field(default_factory=list)
    """Every compiled candidate: `overrides` and `plan` (as in plan.json)."""
    front: list[PlanResult] = field(default_factory=list)
    """Results that no other beats in both dollars per million real tokens and free HBM, cheapest first; if any have a
    schedule, only those, because a roofline is not comparable.
    """
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Candidates that were not compiled: `candidate` and `reason`."""
    left_out: int = 0
    """How many of these, the last ones, `plan.max_candidates` left out."""


def search(planned: Planned) -> Found:
    """Compiles the candidates, `plan.parallel` at a time as memory permits.

    If a candidate does not fit, those that certainly need more are skipped.
    """
    found = Found()
    waiting = list(_candidates(planned, found))
    limit = planned.config.plan.max_candidates
    started = 0
    too_large: list[Candidate] = []
    fitting: list[tuple[PlanResult, Candidate]] = []
    running: list[tuple[Candidate, Compilation]] = []
    try:
        while running or (waiting and started < limit):
            while waiting and started < limit and _room(len(running), planned.config.plan.parallel):
                candidate = waiting.pop(0)
                if smaller := next((one for one in too_large if candidate.needs_more_than(one)), None):
                    reason = f"{' '.join(smaller.overrides)} did not fit"
                    found.skipped.append({"candidate": " ".join(candidate.overrides), "reason": reason})
                    continue
                started += 1
                running.append((candidate, start(_without_schedule(candidate.planned), lambda name: None)))
            for item in list(running):
                candidate, compilation = item
                answer = compilation.wait(0.5)
                if answer is None:
                    continue
                running.remove(item)
                compilation.close()
                result, _ = result_of(candidate.planned, answer)
                if not result.fits:
                    too_large.append(candidate)
                found.results.append({"overrides": list(candidate.overrides), "plan": result})
                fitting += [(result, candidate)] if result.fits else []
                done = len(found.results)
                log.info("%d of at most %d, %s: %s", done, limit, " ".join(candidate.overrides), _told(result))
    finally:
        for _, compilation in running:
            compilation.close()
    found.left_out = len(waiting)
    reason = f"plan.max_candidates={limit}"
    found.skipped += [{"candidate": " ".join(one.overrides), "reason": reason} for one in waiting]
    if planned.config.plan.schedule:
        _schedule(found, fitting, planned.config.plan)
    known = [one["plan"] for one in found.results]
    found.front = pareto([result for result in known if result.step_seconds is not None] or known)
    return found


def _schedule(found: Found, fitting: list[tuple[PlanResult, Candidate]], plan: PlanConfig) -> None:
    """Compiles the candidates with the best rooflines to the end, and replaces their results."""
    best = sorted(fitting, key=lambda one: chip_seconds(one[0]))[: plan.search_schedules]
    for number, ((before, candidate), flags) in enumerate(itertools.product(best, plan.search_flags), 1):
        of = candidate.planned
        changed = replace(of.config, hardware=replace(of.config.hardware, flags=flags))
        overrides = [*candidate.overrides, f"hardware.flags={flags}"]
        log.info("%d of %d to the end: %s", number, len(best) * len(plan.search_flags), " ".join(overrides))
        with attempted(replace(of, config=changed)) as attempt:
            if attempt.goes_on:
                attempt.finish()
        found.results = [one for one in found.results if one["plan"] is not before]
        found.results.append({"overrides": overrides, "plan": attempt.result})
        log.info("%s: %s", " ".join(overrides), _told(attempt.result))


def pareto(results: list[PlanResult]) -> list[PlanResult]:
    """The results that fit and that no other beats in both cost and free HBM, cheapest first."""
    front: list[PlanResult] = []
    for one in sorted((r for r in results if r.fits), key=lambda r: (cost(r), -free(r))):
        if not front or free(one) > free(front[-1]):
            front.append(one)
    return front


def cost(result: PlanResult) -> float:
    """Dollars per million real tokens; chip-seconds if no price is known."""
    if result.usd_per_million_real_tokens is not None:
        return result.usd_per_million_real_tokens
    return result.chips * 1e6 / result.real_tokens_per_second["mid"]


def chip_seconds(result: PlanResult) -> float:
    """Per real token at the binding roofline: a lower bound."""
    assert result.real_tokens_per_update is not None
    return result.chips * result.roofline_seconds["update"] / result.real_tokens_per_update


def free(result: PlanResult) -> float:
    """Share of HBM that is free."""
    return 1 - (result.hbm_bytes_per_chip or 0) / result.hbm_limit_bytes_per_chip


def _candidates(planned: Planned, found: Found) -> Iterator[Candidate]:
    config, checked = planned.config, planned.checked
    devices = checked.slice.devices
    policies = POLICIES if config.trainer.remat == AUTO else tuple(dict.fromkeys((*POLICIES, config.trainer.remat)))
    for tp in sorted((n for n in range(1, devices + 1) if devices % n == 0), reverse=True):
        try:
            resolve_mesh(MeshConfig(tp=tp), checked.architecture, devices)
        except UserError as error:
            reason = str(error).partition("; legal meshes")[0]
            log.info("skipped: %s", reason)
            found.skipped.append({"candidate": f"mesh.tp={tp}", "reason": reason})
    legal = (legal_meshes(checked.architecture, devices, cp) for cp in row_splits(config.data.sequence_length, devices))
    meshes = sorted(itertools.chain(*legal), key=lambda sizes: (-sizes.tp, sizes.dp, sizes.cp))
    for rows, policy, sizes in itertools.product(sorted(config.plan.search_rows), policies, meshes):
        changed = _with(planned, sizes, policy, rows)
        examined, problems = examine_plan(changed)
        if examined is None:
            reason = "; ".join(problem.message for problem in problems)
            found.skipped.append({"candidate": f"{' '.join(sizes.overrides)} {policy} {rows} rows", "reason": reason})
            continue
        yield Candidate(Planned.of(changed, examined, planned), rows)


def _with(planned: Planned, sizes: MeshSizes, policy: str, rows: int) -> PlanRoot:
    config = planned.config
    batch = rows * sizes.row_places * config.trainer.microbatches
    trainer = replace(config.trainer, remat=policy, global_batch_sequences=batch, global_batch_tokens=None)
    return replace(config, mesh=MeshConfig(**sizes._asdict()), trainer=trainer)


def _without_schedule(planned: Planned) -> Planned:
    plan = replace(planned.config.plan, schedule=False)
    return replace(planned, config=replace(planned.config, plan=plan))


def _room(running: int, parallel: int) -> bool:
    """Whether another compilation can start: always one, and more as this machine's memory permits."""
    return running == 0 or (running < parallel and psutil.virtual_memory().available > COMPILATION_BYTES)


def _told(result: PlanResult) -> str:
    if not result.fits:
        return "does not fit"
    used = f"{(result.hbm_bytes_per_chip or 0) / 2**30:.1f} GiB"
    by = "at the assumed utilization" if result.step_seconds is None else "by the schedule"
    return f"{used}, {result.real_tokens_per_second['mid']:,.0f} real tokens/s {by} (estimated)"
