"""`python -m gemma4_tpu.train`: composes a configuration, checks it, trains, and writes a result.

The entry point: configuration (before JAX is imported) → hosts → run folder → `training_run.train` → result, plots,
summary.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from gemma4_tpu.config.entry import EntryPoint
from gemma4_tpu.config.load import Loaded, load
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.errors import PREEMPTED, Ended, exit_code, first_line, leave, stopped_code
from gemma4_tpu.step.objective_kinds import rows_of
from gemma4_tpu.training.checks import Checked, examine_train, normalise
from gemma4_tpu.training.recipe import rows_per_update
from gemma4_tpu.training.rollouts_checks import is_on_policy

if TYPE_CHECKING:
    from gemma4_tpu.tracking.run import RunFolder
    from gemma4_tpu.training.hosts import Hosts
    from gemma4_tpu.training.preemption import Preemption

log = logging.getLogger(__name__)

TRAIN: EntryPoint[TrainRoot, Checked] = EntryPoint(
    name="train",
    schema=TrainRoot,
    normalise=normalise,
    examine=examine_train,
    summary="Fine-tune Gemma 4 with LoRA, QLoRA or in full. Without arguments: a small run, minutes on a laptop.",
    examples=(
        ("", "the embedded tiny model on the embedded data"),
        ("preview=true", "look at the rows: targets, lengths, fill, drops"),
        ("data=chat_jsonl data.train.0.path=rows.jsonl", "your own conversations"),
        ("lora.rank=8 trainer.max_updates=100", "other values"),
        ("experiment=v5p8 model.path=gs://bucket/gemma-4-31b", "31B on a v5p-8 slice"),
        ("run_dir=outputs/train/<run>", "resume a stopped run"),
    ),
)


def load_train(argv: list[str]) -> Loaded[TrainRoot, Checked]:
    """Reads a command line; see `config.load.load`."""
    return load(argv, TRAIN)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished (or stopped by `trainer.time_limit`, and saved), 2 refused (one message on stderr), 3 hung,
    42 preempted and saved, 130 or 143 interrupted.
    """
    return exit_code(lambda: run(load_train(list(sys.argv[1:] if argv is None else argv))).code)


def run(loaded: Loaded[TrainRoot, Checked]) -> Ended:
    """Joins the other processes and trains; if this process fails alone, ends it so that the others notice."""
    config, rows_are = loaded.root, rows_of(loaded.root.objective)
    if config.preview and is_on_policy(config.objective):
        from gemma4_tpu.reporting.shown_prompts import show_prompts

        return Ended(show_prompts(config.model, config.data, rows_are, config.rollouts))
    if config.preview:
        from gemma4_tpu.reporting.preview import show

        rows = rows_per_update(config.trainer, config.data)
        return Ended(show(config.model, config.data, rows_are, rows_per_update=rows, seed=config.trainer.seed))

    from gemma4_tpu.training.hosts import start_hosts
    from gemma4_tpu.training.preemption import Preemption

    with Preemption() as preemption:
        hosts = start_hosts(config.distributed, config.hardware)
        if hosts.count == 1:
            preemption.listen()
        with hosts:
            return _record(loaded, hosts, preemption)


def _record(loaded: Loaded[TrainRoot, Checked], hosts: Hosts, preemption: Preemption) -> Ended:
    """Opens the run folder, trains, and writes result, plots and summary to it."""
    from gemma4_tpu.reporting.curves import plot_run
    from gemma4_tpu.tracking.logs import log_refusal, setup_logging
    from gemma4_tpu.tracking.progress import print_summary
    from gemma4_tpu.tracking.result import Result

    config = loaded.root
    folder = _open_folder(loaded, hosts)
    setup_logging(folder.log_path if folder.write else None, process=hosts.index)
    preemption.last_words = lambda: folder.leave_result(Result(status="preempted"))
    for warning in loaded.checked.warnings:
        log.warning(warning)
    try:
        from gemma4_tpu.training_run import train  # imports JAX; from here on, a refusal or Ctrl-C leaves a result

        result = train(loaded, folder, hosts, preemption)
        if result is None:
            return Ended(0, (folder.path,))
        folder.leave_result(result)
        drawn = plot_run(folder) if folder.write and result.status != "preempted" else []
    except KeyboardInterrupt as stop:
        hint = f"the same command with run_dir={folder.address} resumes from its last checkpoint"
        print(f"\ninterrupted; {hint}", file=sys.stderr)
        return Ended(stopped_code(stop), (folder.path,))
    except Exception as error:
        folder.leave_result(Result(status="failed", error=first_line(error)))
        log_refusal(error)
        raise
    finally:
        folder.put_back()
        folder.close()
    if result.status == "preempted":
        log.warning("preempted and saved at update %d: run_dir=%s resumes from there", result.updates, folder.address)
        return Ended(PREEMPTED, (folder.path,))
    if result.ended:
        log.warning("ended after update %d: %s", result.updates, result.ended)
    if folder.write:
        steps = [f"look at {path}" for path in drawn[:1]]
        if not (config.model.path or "").startswith("random:"):
            steps.append(f"python -m gemma4_tpu.merge run={folder.address}")
        print_summary(folder, result, steps)
    return Ended(0, (folder.path,))


def _open_folder(loaded: Loaded[TrainRoot, Checked], hosts: Hosts) -> RunFolder:
    """Process 0 creates or opens the run folder; the others get its address."""
    from gemma4_tpu.tracking.run import RunFolder

    config, opened = loaded.root, []

    def choose() -> str:
        folder = RunFolder.open(
            "outputs", config.name, config.run_dir, config.checkpoint.resume, config=asdict(config),
            overrides=loaded.overrides, resume_allow=config.checkpoint.resume_allow,
        )  # fmt: skip
        opened.append(folder)
        return folder.address

    address = hosts.from_first(choose)
    return opened[0] if opened else RunFolder.existing(address, key="run_dir, chosen by process 0,")


if __name__ == "__main__":
    leave(main())
