"""Compiles configurations in child processes, shows progress, and turns answers into estimates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from rich import progress

from gemma4_tpu.planning.auto_remat import AUTO, first_that_fits
from gemma4_tpu.planning.calibration import ScheduleRates
from gemma4_tpu.planning.compilation import FINISHED, Compilation, CompilationRequest
from gemma4_tpu.planning.estimate import ESTIMATED_BY, PlanResult, estimate
from gemma4_tpu.planning.planned import Planned
from gemma4_tpu.planning.schedule import from_plain
from gemma4_tpu.planning.walk import Walked, walk
from gemma4_tpu.tracking.logs import console

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


@dataclass
class Attempt:
    """A configuration whose memory is assigned, possibly still compiling. Must be closed."""

    planned: Planned
    result: PlanResult
    """Without the schedule, unless it is already known."""
    walked: Walked | None
    """The schedule's time, if known."""
    compilation: Compilation

    @property
    def goes_on(self) -> bool:
        """Whether the compiler is still working on the schedule."""
        return self.result.fits and self.planned.config.plan.schedule and self.walked is None

    def finish(self) -> None:
        """Waits for the schedule, showing progress.

        Raises:
          RuntimeError: the compiler failed.
        """
        with _shown(_title(self.planned), "compiling to the end") as show:
            while (answer := self.compilation.wait(1.0, FINISHED)) is None:
                show(None)
        self.result, self.walked = result_of(self.planned, answer)


@contextmanager
def attempted(planned: Planned) -> Iterator[Attempt]:
    """Compiles one configuration until its memory is assigned; with `trainer.remat=auto`, tries policies until one
    fits.

    Raises:
      UserError: the compiler refused the configuration.
    """
    with ExitStack() as open_:

        def attempt(policy: str) -> Attempt:
            open_.close()  # the previous policy did not fit
            trainer = replace(planned.config.trainer, remat=policy)
            return _attempt(replace(planned, config=replace(planned.config, trainer=trainer)), open_)

        if planned.config.trainer.remat == AUTO:
            yield first_that_fits(
                attempt, lambda one: (one.result.hbm_bytes_per_chip, one.result.hbm_limit_bytes_per_chip)
            )
        else:
            yield attempt(planned.config.trainer.remat)


def plan_one(planned: Planned) -> PlanResult:
    """The result without a schedule (unless it is already known); see `attempted`."""
    with attempted(planned) as attempt:
        return attempt.result


def start(planned: Planned, stage: Callable[[str], None]) -> Compilation:
    """Starts to compile a configuration."""
    return Compilation(CompilationRequest(planned.config), stage)


def result_of(planned: Planned, answer: dict[str, Any]) -> tuple[PlanResult, Walked | None]:
    """Converts the compiling process's answer to a result, and the time of its schedule if there is one."""
    config, checked = planned.config, planned.checked
    if "out_of_memory" not in answer:
        walked, ops = None, answer["compiled"]["schedule"]
        if ops and config.plan.schedule:
            visited = cache(partial(planned.fill.share_visited, length=config.data.sequence_length))
            walked = walk(from_plain(ops), ScheduleRates.of(checked.slice), visited)
        return estimate(planned, answer, walked), walked
    told, limit = answer["out_of_memory"], answer["hbm_limit_bytes"]
    result = PlanResult(
        fits=False,
        **planned.recipe.described(),
        estimated_by=ESTIMATED_BY,
        hbm_limit_bytes_per_chip=limit,
        hbm_bytes_per_chip=told["needed_bytes"],
        hbm_parts_bytes_per_chip=answer["held"],
        message=told["message"],
        versions=answer["versions"],
    )
    return result, None


def _attempt(planned: Planned, open_: ExitStack) -> Attempt:
    with _shown(_title(planned), "starting the compiler") as show:
        compilation = open_.enter_context(closing(start(planned, show)))
        while (answer := compilation.wait(1.0)) is None:
            show(None)
    return Attempt(planned, *result_of(planned, answer), compilation)


def _title(planned: Planned) -> str:
    config = planned.config
    return f"{config.model.name} for {planned.checked.slice.name}, remat {config.trainer.remat}"


@contextmanager
def _shown(title: str, stage: str) -> Iterator[Callable[[str | None], None]]:
    """Shows what is being compiled and for how long; off a terminal, logs a line now and then."""
    started = last = time.monotonic()
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
