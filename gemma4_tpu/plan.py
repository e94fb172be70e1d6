"""`python -m gemma4_tpu.plan`: whether a run fits, how fast it is, what it costs. Needs neither TPU nor weights.

Configuration → row lengths → the training step, compiled for the slice in a separate process → estimates; a few minutes
later, the compiler's schedule → time.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.errors import Ended, exit_code, leave
from gemma4_tpu.planning.checks import PlanChecked, examine_plan, normalise_plan

if TYPE_CHECKING:
    from gemma4_tpu.config.schema import ModelConfig
    from gemma4_tpu.planning.attempt import Attempt
    from gemma4_tpu.planning.planned import Planned
    from gemma4_tpu.tracking.run import RunFolder

log = logging.getLogger(__name__)
DOES_NOT_FIT = 1


PLAN: EntryPoint[PlanRoot, PlanChecked] = EntryPoint(
    name="plan",
    schema=PlanRoot,
    normalise=normalise_plan,
    examine=examine_plan,
    summary=(
        "Say whether a run fits, how long it takes, and what it costs. Compiles the training step for the"
        " slice, without a TPU and without weights. Without arguments: 31B with LoRA on a v5p-8, in a few minutes."
    ),
    examples=(
        ("hardware=v5p8 model=gemma4_31b lora.rank=64", "31B with LoRA of rank 64 on a v5p-8"),
        ("experiment=v5p8", "the run that `train experiment=v5p8` starts"),
        ("hardware=v6e4 lora=qlora_nf4 trainer.global_batch_sequences=2", "QLoRA on a v6e-4, two rows per update"),
        ("hardware=v6e8 search=true", "meshes × remat × batch: cost and headroom of each"),
        ("experiment=v5p8 calibration=outputs/train", "with a band from your own runs on such chips"),
        ("model=gemma4_e4b model.path=<checkpoint> data.train.0.path=rows.jsonl", "lengths of your own rows"),
    ),
    shorthands={"search": "plan.search", "calibration": "plan.calibration"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 it fits, 1 it does not fit, 2 refused (one message on stderr), 130 or 143 interrupted."""
    return exit_code(lambda: run(load(list(sys.argv[1:] if argv is None else argv), PLAN)).code)


def run(loaded: Loaded[PlanRoot, PlanChecked]) -> Ended:
    """Opens the plan's folder and writes plan.json (or search.json) and plots to it."""
    from gemma4_tpu.planning.planned import Planned
    from gemma4_tpu.tracking import records
    from gemma4_tpu.tracking.logs import setup_logging
    from gemma4_tpu.tracking.run import RunFolder

    config = loaded.root
    setup_logging()
    planned = Planned.of(config, loaded.checked)
    folder = RunFolder.open(
        "outputs", config.name, config.run_dir, "auto", config=asdict(config), kind=records.PLAN,
        overrides=loaded.overrides,
    )  # fmt: skip
    setup_logging(folder.log_path)
    for warning in loaded.checked.warnings:
        log.warning(warning)
    _look_at_checkpoint(config.model, loaded.checked.missing)
    try:
        code = _search(planned, folder) if config.plan.search else _plan(planned, folder)
        return Ended(code, (folder.path,))
    finally:
        folder.close()


def _look_at_checkpoint(model: ModelConfig, told: Sequence[str]) -> None:
    """Logs what training would refuse in the checkpoint, if there is one already; a plan needs none."""
    from gemma4_tpu.models.audit import look_from_afar

    if model.path is None:
        return
    found = look_from_afar(model)
    refused = [f"training would be refused: {problem}" for problem in found.problems if problem not in told]
    for line in [*found.notes, *refused]:
        log.warning("%s", line)


def _plan(planned: Planned, folder: RunFolder) -> int:
    """Plans one configuration, first its memory, then its schedule; if it does not fit, finds some that do."""
    from gemma4_tpu.planning.attempt import attempted
    from gemma4_tpu.planning.misfit import misfit_line, nearest_fits
    from gemma4_tpu.reporting.plans import print_alternatives, print_plan, print_schedule

    with attempted(planned) as attempt:
        first = attempt.goes_on
        if first:
            _keep(attempt, folder)
            print_plan(attempt.result, folder.path)
            log.info("the schedule takes minutes; the figures above stay, and plan.schedule=false skips it")
            attempt.finish()
        result, walked = attempt.result, attempt.walked
    if not result.fits:
        print(f"does not fit: {misfit_line(result)}", file=sys.stderr)
        if "misfit" not in result.rollouts:  # that says what would fit
            tried = nearest_fits(planned, result, planned.config.plan.max_attempts)
            attempt.result = replace(result, alternatives=tried)
    _keep(attempt, folder)
    (print_schedule if first and walked is not None else print_plan)(attempt.result, folder.path)
    print_alternatives(attempt.result)
    return 0 if result.fits else DOES_NOT_FIT


def _keep(attempt: Attempt, folder: RunFolder) -> None:
    """Writes plan.json and plots."""
    from gemma4_tpu.reporting.memory_bars import plot_hbm
    from gemma4_tpu.reporting.timeline import plot_timeline
    from gemma4_tpu.tracking import records

    result = attempt.result
    records.write_record(folder.path / records.PLAN_FILE, records.PLAN, result)
    plot_hbm([result], folder.path / "hbm.png")
    if attempt.walked is not None:
        title = f"One iteration of the slowest loop: {result.model}, {result.trained}, on {result.slice}"
        plot_timeline(attempt.walked, title, folder.path / "timeline.png")


def _search(planned: Planned, folder: RunFolder) -> int:
    """Compiles every candidate for the slice; marks those that no other beats in both cost and headroom."""
    from gemma4_tpu.planning.search import search
    from gemma4_tpu.reporting.memory_bars import plot_hbm
    from gemma4_tpu.reporting.plans import print_search
    from gemma4_tpu.tracking import records

    found = search(planned)
    records.write_record(folder.path / "search.json", records.SEARCH, found)
    if found.front:
        plot_hbm(found.front, folder.path / "hbm.png")
    print_search(found, folder.path)
    return 0 if found.front else DOES_NOT_FIT


if __name__ == "__main__":
    leave(main())
