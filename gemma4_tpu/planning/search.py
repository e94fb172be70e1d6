"""Meshes × remat policies × rows of a slice: every candidate compiled, and which of them are worth considering."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from gemma4_tpu.config.checks import resolve_mesh
from gemma4_tpu.config.plan_checks import examine_plan
from gemma4_tpu.config.schema import MeshConfig
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.planning.attempt import Planned, result_of, start
from gemma4_tpu.planning.child import Compilation
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.remat import AUTO, POLICIES

log = logging.getLogger(__name__)
COMPILATION_BYTES = 6 * 2**30
"""Memory of this machine that one compilation of a large model may take."""


@dataclass(frozen=True)
class Candidate:
    """One point of the grid."""

    planned: Planned
    rows: int
    """Rows for each place on the fsdp axis and microbatch."""

    @property
    def overrides(self) -> tuple[str, ...]:
        config = self.planned.config
        return (
            f"mesh.fsdp={config.mesh.fsdp}",
            f"mesh.tp={config.mesh.tp}",
            f"trainer.remat={config.trainer.remat}",
            f"trainer.global_batch_sequences={config.trainer.global_batch_sequences}",
        )

    @property
    def kind(self) -> tuple[int | None, str]:
        return self.planned.config.mesh.tp, self.planned.config.trainer.remat


@dataclass
class Found:
    """What a search found; `search.json`."""

    results: list[dict[str, Any]] = field(default_factory=list)
    """Every compiled candidate: `overrides` and `plan` (as in plan.json)."""
    front: list[PlanResult] = field(default_factory=list)
    """Those that no other beats in both dollars per million real tokens and free HBM, cheapest first."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Candidates that were not compiled: `candidate` and `reason`."""


def search(planned: Planned) -> Found:
    """Compiles the candidates, `plan.parallel` at a time as far as memory permits.

    More rows than a number that did not fit are not tried with the same mesh and policy.
    """
    found = Found()
    waiting = list(_candidates(planned, found))
    limit = planned.config.plan.max_candidates
    found.skipped += [
        {"candidate": " ".join(one.overrides), "reason": f"plan.max_candidates={limit}"} for one in waiting[limit:]
    ]
    waiting = waiting[:limit]
    total, done = len(waiting), 0
    too_many: dict[tuple[int | None, str], int] = {}
    running: list[tuple[Candidate, Compilation]] = []
    try:
        while waiting or running:
            while waiting and _room(len(running), planned.config.plan.parallel):
                candidate = waiting.pop(0)
                if candidate.rows >= too_many.get(candidate.kind, candidate.rows + 1):
                    done += 1
                    found.skipped.append(
                        {"candidate": " ".join(candidate.overrides), "reason": "fewer rows did not fit"}
                    )
                    continue
                running.append((candidate, start(candidate.planned, lambda name: None)))
            for item in list(running):
                candidate, compilation = item
                answer = compilation.wait(0.5)
                if answer is None:
                    continue
                running.remove(item)
                done += 1
                result = result_of(candidate.planned, answer)
                if not result.fits:
                    too_many[candidate.kind] = min(candidate.rows, too_many.get(candidate.kind, candidate.rows))
                found.results.append({"overrides": list(candidate.overrides), "plan": result})
                log.info("%d/%d %s: %s", done, total, " ".join(candidate.overrides), _told(result))
    finally:
        for _, compilation in running:
            compilation.close()
    found.front = pareto([one["plan"] for one in found.results])
    return found


def pareto(results: list[PlanResult]) -> list[PlanResult]:
    """The results that fit and that no other beats in both cost and free HBM, cheapest first."""
    front: list[PlanResult] = []
    for one in sorted((r for r in results if r.fits), key=lambda r: (cost(r), -free(r))):
        if not front or free(one) > free(front[-1]):
            front.append(one)
    return front


def cost(result: PlanResult) -> float:
    """Dollars per million real tokens; chip-seconds where no price is known."""
    if result.usd_per_million_real_tokens is not None:
        return result.usd_per_million_real_tokens
    return result.chips * 1e6 / result.real_tokens_per_second["mid"]


def free(result: PlanResult) -> float:
    """Share of HBM that is left."""
    return 1 - (result.hbm_bytes_per_chip or 0) / result.hbm_limit_bytes_per_chip


def _candidates(planned: Planned, found: Found) -> Iterator[Candidate]:
    config, checked = planned.config, planned.checked
    chips = checked.slice.chips
    policies = POLICIES if config.trainer.remat == AUTO else tuple(dict.fromkeys((*POLICIES, config.trainer.remat)))
    for tp in sorted((n for n in range(1, chips + 1) if chips % n == 0), reverse=True):
        try:
            fsdp, _ = resolve_mesh(MeshConfig(fsdp=chips // tp, tp=tp), checked.architecture, chips)
        except UserError as error:
            reason = str(error).partition("; legal meshes")[0]
            log.info("skipped: %s", reason)
            found.skipped.append({"candidate": f"mesh.fsdp={chips // tp} mesh.tp={tp}", "reason": reason})
            continue
        for rows in sorted(config.plan.search_rows):
            for policy in policies:
                changed = _with(config, fsdp, tp, policy, rows)
                examined, problems = examine_plan(changed)
                if examined is None:
                    reason = "; ".join(problem.message for problem in problems)
                    found.skipped.append({"candidate": f"mesh.tp={tp} {policy} {rows} rows", "reason": reason})
                    continue
                yield Candidate(Planned.of(changed, examined, planned), rows)


def _with(config: PlanRoot, fsdp: int, tp: int, policy: str, rows: int) -> PlanRoot:
    batch = rows * fsdp * config.trainer.microbatches
    trainer = replace(config.trainer, remat=policy, global_batch_sequences=batch, global_batch_tokens=None)
    return replace(config, mesh=replace(config.mesh, fsdp=fsdp, tp=tp), trainer=trainer)


def _room(running: int, parallel: int) -> bool:
    """Whether another compilation may start: one always, more as the memory of this machine permits."""
    return running == 0 or (running < parallel and psutil.virtual_memory().available > COMPILATION_BYTES)


def _told(result: PlanResult) -> str:
    if not result.fits:
        return "does not fit"
    used = f"{(result.hbm_bytes_per_chip or 0) / 2**30:.1f} GiB"
    return f"{used}, {result.real_tokens_per_second['mid']:,.0f} real tokens/s (estimated)"
