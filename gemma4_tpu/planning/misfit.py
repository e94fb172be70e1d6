"""What to change when a run does not fit: the nearest changes, cheapest first, each tried by compiling it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gemma4_tpu.config.checks import rows_per_update
from gemma4_tpu.config.plan_checks import examine_plan
from gemma4_tpu.config.schema import PlanRoot
from gemma4_tpu.planning.attempt import Planned, plan_one
from gemma4_tpu.planning.remat import AUTO, POLICIES

log = logging.getLogger(__name__)
ENOUGH = 2
"""Changes that fit, after which no more are tried."""


@dataclass(frozen=True)
class Change:
    """A change to the configuration."""

    overrides: tuple[str, ...]
    """As given on the command line."""
    config: PlanRoot


def changes(config: PlanRoot, fsdp: int, legal_meshes: list[tuple[int, int]]) -> Iterator[Change]:
    """Changes by what they cost: more remat and microbatches cost nothing but time, then rows, mesh, quantised weights.

    Each but the first is tried with the most remat, so that it is the change itself that decides.
    """
    trainer, most = config.trainer, POLICIES[-1]
    remat = () if trainer.remat in (most, AUTO) else (f"trainer.remat={most}",)
    saving = replace(trainer, remat=most)
    if remat:
        yield Change(remat, replace(config, trainer=saving))
    rows = rows_per_update(trainer, config.data)
    most_microbatches = rows // fsdp
    if trainer.microbatches < most_microbatches:
        changed = replace(saving, microbatches=most_microbatches)
        yield Change((*remat, f"trainer.microbatches={most_microbatches}"), replace(config, trainer=changed))
    elif rows > fsdp:
        changed = replace(saving, global_batch_sequences=fsdp, global_batch_tokens=None, microbatches=1)
        words = (*remat, f"trainer.global_batch_sequences={fsdp}", "trainer.microbatches=1")
        yield Change(words, replace(config, trainer=changed))
    for other_fsdp, tp in sorted(legal_meshes, key=lambda sizes: -sizes[1]):
        if other_fsdp == fsdp:
            continue
        microbatches = max(1, rows // other_fsdp)
        changed = replace(saving, global_batch_sequences=other_fsdp * microbatches, global_batch_tokens=None,
                          microbatches=microbatches)  # fmt: skip
        mesh = replace(config.mesh, fsdp=other_fsdp, tp=tp)
        words = (*remat, f"mesh.fsdp={other_fsdp}", f"mesh.tp={tp}",
                 f"trainer.global_batch_sequences={other_fsdp * microbatches}",
                 f"trainer.microbatches={microbatches}")  # fmt: skip
        yield Change(words, replace(config, trainer=changed, mesh=mesh))
    if config.lora.enabled and config.lora.quantize is None:
        microbatches = max(1, most_microbatches)
        changed = replace(saving, microbatches=microbatches)
        words = (*remat, "lora.quantize=nf4", f"trainer.microbatches={microbatches}")
        yield Change(words, replace(config, trainer=changed, lora=replace(config.lora, quantize="nf4")))
    if not config.lora.enabled:
        lora = replace(config.lora, enabled=True)
        yield Change((*remat, "lora=default"), replace(config, trainer=saving, lora=lora))
    if config.data.sequence_length > 1024:
        length = config.data.sequence_length // 2
        data = replace(config.data, sequence_length=length)
        yield Change((*remat, f"data.sequence_length={length}"), replace(config, trainer=saving, data=data))


def nearest_fits(planned: Planned, attempts: int) -> list[dict[str, Any]]:
    """Tries changes until `ENOUGH` fit or `attempts` are spent; what was tried, as in `PlanResult.alternatives`."""
    checked = planned.checked
    chips = checked.slice.chips
    legal = [(chips // tp, tp) for tp in checked.architecture.legal_tp(chips)]
    tried: list[dict[str, Any]] = []
    for change in changes(planned.config, checked.mesh[0], legal):
        if len(tried) >= attempts or sum(one["fits"] for one in tried) >= ENOUGH:
            break
        found, problems = examine_plan(change.config)
        if found is None:
            log.debug("%s: %s", " ".join(change.overrides), problems)
            continue
        result = plan_one(Planned.of(change.config, found, planned))
        log.info("%s: %s", " ".join(change.overrides), "fits" if result.fits else "does not fit")
        tried.append(
            {
                "overrides": list(change.overrides),
                "fits": result.fits,
                "hbm_bytes_per_chip": result.hbm_bytes_per_chip,
                "usd_per_million_real_tokens": result.usd_per_million_real_tokens,
            }
        )
    return tried
