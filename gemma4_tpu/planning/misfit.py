"""Finds changes that make a run fit: the smallest first, each tried by compiling it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.machines import MeshConfig
from gemma4_tpu.config.schema import LoraConfig, TrainerConfig
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.hardware import GIB, MeshSizes
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.planning.attempt import plan_one
from gemma4_tpu.planning.auto_remat import AUTO, POLICIES
from gemma4_tpu.planning.checks import examine_plan
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.planning.planned import Planned
from gemma4_tpu.training.meshes import legal_meshes, row_splits
from gemma4_tpu.training.recipe import rows_per_update

log = logging.getLogger(__name__)
ENOUGH = 2
"""Number of changes that fit, after which the search stops."""
MARGIN = 1.15
"""Temporaries do not shrink quite in proportion to rows."""


@dataclass(frozen=True)
class ConfigChange:
    """A change to the configuration."""

    overrides: tuple[str, ...]
    """As on the command line."""
    config: PlanRoot


def changes(planned: Planned, meshes: list[MeshSizes], last: Callable[[], PlanResult]) -> Iterator[ConfigChange]:
    """Yields changes by cost: remat and microbatches cost time, then rows, mesh, quantised weights, the largest fully
    trained weights, length.

    From the second on, each comes with the most remat, so that the change itself decides.

    Args:
      planned: what does not fit.
      meshes: other meshes to try.
      last: the result of the previous change; initially of `planned` itself.
    """
    config, sizes = planned.config, planned.checked.mesh
    remat, saving = _most_remat(config.trainer)
    if remat:
        yield ConfigChange(remat, replace(config, trainer=saving))
        if last().fits:  # less remat may suffice, and recomputes less
            for policy in POLICIES[_place(config.trainer.remat) : -1]:
                trainer = replace(config.trainer, remat=policy)
                yield ConfigChange((f"trainer.remat={policy}",), replace(config, trainer=trainer))
    rows = rows_per_update(saving, config.data)
    smaller = [
        n for n in range(saving.microbatches + 1, rows + 1) if rows % n == 0 and rows // n % sizes.row_places == 0
    ]
    if smaller:
        wanted = saving.microbatches * _times_too_much(last()) * MARGIN
        number = next((n for n in smaller if n >= wanted), smaller[-1])
        trainer = replace(saving, microbatches=number)
        yield ConfigChange((*remat, f"trainer.microbatches={number}"), replace(config, trainer=trainer))
    for other in meshes:
        if other == sizes:
            continue
        words, trainer = _one_row_each(saving, rows, other.row_places)
        left_out = [f"mesh.{axis}=1" for axis in ("dp", "cp") if getattr(sizes, axis) > getattr(other, axis) == 1]
        mesh = (*left_out, *other.overrides)
        changed = replace(config, trainer=trainer, mesh=MeshConfig(**other._asdict()))
        yield ConfigChange((*remat, *mesh, *words), changed)
    words, trainer = _one_row_each(saving, rows, sizes.row_places)
    if not config.lora.enabled:
        lora = replace(config.lora, enabled=True)
        yield ConfigChange((*remat, "lora=default", *words), replace(config, trainer=trainer, lora=lora))
    elif config.lora.quantize is None:
        lora = replace(config.lora, quantize="nf4")
        yield ConfigChange((*remat, "lora.quantize=nf4", *words), replace(config, trainer=trainer, lora=lora))
    if config.lora.enabled and config.lora.modules_to_train:
        lora = _without_the_largest(config.lora, planned.checked.architecture)
        word = f"lora.modules_to_train=[{','.join(lora.modules_to_train)}]"
        yield ConfigChange((*remat, word, *words), replace(config, trainer=trainer, lora=lora))
    length = config.data.sequence_length // 2
    if length >= 1024:
        data = replace(config.data, sequence_length=length)
        word = f"data.sequence_length={length}"
        yield ConfigChange((*remat, word, *words), replace(config, trainer=trainer, data=data))


def _without_the_largest(lora: LoraConfig, arch: Architecture) -> LoraConfig:
    """Excludes what takes most of the fully trained weights: 16 bytes of HBM per parameter with AdamW."""

    def parameters(module: str) -> int:
        leaves = Layout.of(arch, replace(lora, modules_to_train=[module])).trained_in_full()
        return sum(math.prod(leaf.array_shape) for leaf in leaves)

    largest = max(lora.modules_to_train, key=parameters)
    return replace(lora, modules_to_train=[module for module in lora.modules_to_train if module != largest])


def _place(policy: str) -> int:
    """Index of the first policy that keeps less than this one."""
    return POLICIES.index(policy) + 1 if policy in POLICIES else 0


def _most_remat(trainer: TrainerConfig) -> tuple[tuple[str, ...], TrainerConfig]:
    """Overrides for the most remat (none if it is set already), and the trainer with it."""
    most = POLICIES[-1]
    words = () if trainer.remat in (most, AUTO) else (f"trainer.remat={most}",)
    return words, replace(trainer, remat=most)


def _one_row_each(trainer: TrainerConfig, rows: int, places: int) -> tuple[tuple[str, ...], TrainerConfig]:
    """About the same number of rows per update, one at a time on each place of the axes dp and fsdp."""
    microbatches = max(1, rows // places)
    words: tuple[str, ...] = (
        f"trainer.global_batch_sequences={places * microbatches}",
        f"trainer.microbatches={microbatches}",
    )
    if (places * microbatches, microbatches) == (rows, trainer.microbatches):
        words = ()
    return words, replace(
        trainer, global_batch_sequences=places * microbatches, global_batch_tokens=None, microbatches=microbatches
    )


def _times_too_much(result: PlanResult) -> float:
    """Needed over available HBM of a result; 1 if the compiler does not say."""
    return max(1.0, (result.hbm_bytes_per_chip or 0) / result.hbm_limit_bytes_per_chip)


def nearest_fits(planned: Planned, misfit: PlanResult, attempts: int) -> list[dict[str, Any]]:
    """Tries changes until `ENOUGH` fit or `attempts` are used up; returns what was tried, as in
    `PlanResult.alternatives`.
    """
    devices, arch = planned.checked.slice.devices, planned.checked.architecture
    splits = row_splits(planned.config.data.sequence_length, devices)
    meshes = [sizes for cp in splits for sizes in legal_meshes(arch, devices, cp) if sizes.dp == 1]
    meshes.sort(key=lambda sizes: (-sizes.tp, -sizes.cp))
    tried: list[dict[str, Any]] = []
    results = [misfit]
    for change in changes(planned, meshes, lambda: results[-1]):
        found, problems = examine_plan(change.config)
        if found is None:
            log.info("%s: %s", " ".join(change.overrides), "; ".join(problem.message for problem in problems))
            continue
        if len(tried) >= attempts or sum(one["fits"] for one in tried) >= ENOUGH:
            break
        last = plan_one(Planned.of(change.config, found, planned))
        results.append(last)
        log.info("%s: %s", " ".join(change.overrides), "fits" if last.fits else "does not fit")
        tried.append(
            {
                "overrides": list(change.overrides),
                "fits": last.fits,
                "hbm_bytes_per_chip": last.hbm_bytes_per_chip,
                "usd_per_million_real_tokens": last.usd_per_million_real_tokens,
            }
        )
    return tried


def format_bytes(size: float) -> str:
    """`1.23 GiB`, or `4.5 MiB` below a hundredth of one."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"


def misfit_line(result: PlanResult) -> str:
    """The compiler's figures in one line."""
    limit = f"{result.hbm_limit_bytes_per_chip / GIB:.2f} GiB of HBM per {result.slice.partition('-')[0]} chip"
    if "misfit" in result.rollouts:
        return str(result.rollouts["misfit"])
    if "vmem" in result.message.partition("\n")[0]:
        return f"a kernel asks for too much on-chip memory: {result.message.splitlines()[0]}"
    if result.hbm_bytes_per_chip is None:
        return f"the compiler ran out of the {limit}: {result.message.splitlines()[0]}"
    what = "temporaries alone need" if "temporaries" in result.message.splitlines()[0] else "the step needs"
    return f"{what} {result.hbm_bytes_per_chip / GIB:.1f} GiB, there are {limit} (the compiler's figures)"
