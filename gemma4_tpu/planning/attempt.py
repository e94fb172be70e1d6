"""Compiles configurations in child processes, shows that it is under way, and turns answers into estimates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich import progress

from gemma4_tpu.config.plan_checks import PlanChecked
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.planning.child import Compilation, Request
from gemma4_tpu.planning.estimate import PlanResult, describe, estimate
from gemma4_tpu.planning.fill import Fill, Lengths, fill_of, lengths_of
from gemma4_tpu.planning.remat import AUTO, first_that_fits
from gemma4_tpu.tracking.logs import console

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Planned:
    """A configuration that passed the checks, and what its data makes of it."""

    config: PlanRoot
    checked: PlanChecked
    lengths: Lengths
    fill: Fill

    @staticmethod
    def of(config: PlanRoot, checked: PlanChecked, like: Planned | None = None) -> Planned:
        """`like`: a plan whose lengths serve here too, if it has the same data."""
        if like is not None and like.config.data == config.data:
            lengths = like.lengths
        else:
            lengths = lengths_of(config, checked.data_here)
        return Planned(config, checked, lengths, fill_of(lengths, config.data, config.trainer))


def plan_one(planned: Planned) -> PlanResult:
    """Compiles one configuration; `trainer.remat=auto` compiles policies until one fits.

    Raises:
      UserError: the compiler refused the configuration.
    """
    if planned.config.trainer.remat != AUTO:
        return _compile(planned)

    def attempt(policy: str) -> PlanResult:
        trainer = replace(planned.config.trainer, remat=policy)
        return _compile(replace(planned, config=replace(planned.config, trainer=trainer)))

    return first_that_fits(attempt, lambda result: (result.hbm_bytes_per_chip, result.hbm_limit_bytes_per_chip))


def start(planned: Planned, stage: Callable[[str], None]) -> Compilation:
    """Begins to compile a configuration."""
    return Compilation(Request(planned.config, planned.fill.updates), stage)


def result_of(planned: Planned, answer: dict[str, Any]) -> PlanResult:
    """What the compiling process answered, as a result."""
    config, checked = planned.config, planned.checked
    if "out_of_memory" not in answer:
        return estimate(config, checked.architecture, checked.slice, checked.mesh, planned.fill, answer)
    told, limit = answer["out_of_memory"], answer["hbm_limit_bytes"]
    return PlanResult(
        fits=False,
        **describe(config, checked.slice, checked.mesh),
        hbm_limit_bytes_per_chip=limit,
        hbm_bytes_per_chip=told["needed_bytes"],
        hbm_parts_bytes_per_chip=answer["held"],
        message=told["message"],
        versions=answer["versions"],
    )


def _compile(planned: Planned) -> PlanResult:
    config, checked = planned.config, planned.checked
    title = f"{config.model.name} for {checked.slice.name}, remat {config.trainer.remat}"
    with _shown(title) as show:
        compilation = start(planned, show)
        try:
            while (answer := compilation.wait(1.0)) is None:
                show(None)
        finally:
            compilation.close()
    return result_of(planned, answer)


@contextmanager
def _shown(title: str):
    """A line that tells what is being compiled and for how long; a log line now and then where nobody watches."""
    started, stage, last = time.monotonic(), "starting the compiler", time.monotonic()
    bar = None
    if console().is_terminal:
        columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
        bar = progress.Progress(*columns, console=console(), transient=True)
        task = bar.add_task(f"{title}: {stage}", total=None)
        bar.start()

    def show(now: str | None) -> None:
        nonlocal stage, last
        due = time.monotonic() - last >= SECONDS_BETWEEN_LINES
        changed, stage = now is not None and now != stage, now or stage
        if bar is not None:
            bar.update(task, description=f"{title}: {stage}")
        elif changed or due:
            last = time.monotonic()
            log.info("%s: %s (%.0f s)", title, stage, last - started)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()
