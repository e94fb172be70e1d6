"""`python -m gemma4_tpu.train`: compose a configuration, check it, build what it describes, train.

Reads top to bottom: configuration (JAX is not there yet) → run folder → data → devices and weights → loop → result.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemma4_tpu.compiler_flags import compiler_options
from gemma4_tpu.config.checks import Checked
from gemma4_tpu.config.load import Loaded, load_train
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.errors import INTERRUPTED, PREEMPTED, exit_code, first_line

if TYPE_CHECKING:
    from gemma4_tpu.evals.heldout import HeldoutAnswers
    from gemma4_tpu.tracking.result import Result
    from gemma4_tpu.tracking.run import RunFolder
    from gemma4_tpu.training.batches import Batches
    from gemma4_tpu.training.hosts import Hosts
    from gemma4_tpu.training.job import Job
    from gemma4_tpu.training.preemption import Preemption
    from gemma4_tpu.training.replay import Replay

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, 2 refused (one message on stderr), 3 hung, 42 preempted and saved, 130 interrupted."""
    return exit_code(lambda: _run(load_train(list(sys.argv[1:] if argv is None else argv))))


def _run(loaded: Loaded[TrainRoot, Checked]) -> int:
    """Joins the other processes, trains, and ends this one so that the others notice where it fails alone."""
    if loaded.root.preview:
        from gemma4_tpu.data.preview import show

        return show(loaded.root)

    from gemma4_tpu.training.hosts import start_hosts
    from gemma4_tpu.training.preemption import Preemption

    with Preemption() as preemption:
        hosts = start_hosts(loaded.root.distributed, loaded.root.hardware)
        if hosts.count == 1:
            preemption.listen()
        with hosts:
            return _record(loaded, hosts, preemption)


def _record(loaded: Loaded[TrainRoot, Checked], hosts: Hosts, preemption: Preemption) -> int:
    """Opens the run folder, trains in it, and leaves a result, plots and a summary there."""
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
        result = _train(loaded, folder, hosts, preemption)
        if result is None:
            return 0
        folder.leave_result(result)
        drawn = plot_run(folder) if folder.write and result.status != "preempted" else []
    except KeyboardInterrupt:
        hint = f"the same command with run_dir={folder.address} goes on from its last checkpoint"
        print(f"\ninterrupted; {hint}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        folder.leave_result(Result(status="failed", error=first_line(error)))
        log_refusal(error)
        raise
    finally:
        folder.put_back()
        folder.close()
    if result.status == "preempted":
        log.warning("preempted and saved at update %d: run_dir=%s goes on from there", result.updates, folder.address)
        return PREEMPTED
    if folder.write:
        steps = [f"look at {path}" for path in drawn[:1]]
        if not (config.model.path or "").startswith("random:"):
            steps.append(f"python -m gemma4_tpu.merge run={folder.address}")
        print_summary(folder, result, steps)
    return 0


def _open_folder(loaded: Loaded[TrainRoot, Checked], hosts: Hosts) -> RunFolder:
    """Process 0 makes or opens the run folder; the others are told which it is."""
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


def _train(
    loaded: Loaded[TrainRoot, Checked], folder: RunFolder, hosts: Hosts, preemption: Preemption
) -> Result | None:
    """The main job: rows to batches, weights to the mesh, updates, result; None where nothing is left to do."""
    from gemma4_tpu.config.checks import warmup_warning
    from gemma4_tpu.data.build import build_data
    from gemma4_tpu.data.tokenizer import load_tokenizer
    from gemma4_tpu.evals.heldout import HeldoutAnswers
    from gemma4_tpu.models.audit import audit
    from gemma4_tpu.models.base import resolve_base
    from gemma4_tpu.planning.remat import resolve_remat
    from gemma4_tpu.tracking import provenance, records
    from gemma4_tpu.training import resume
    from gemma4_tpu.training.batches import make_batches
    from gemma4_tpu.training.compile_cache import use_compile_cache
    from gemma4_tpu.training.job import build_job, check_capacity, start_mesh
    from gemma4_tpu.training.profile import check_profile
    from gemma4_tpu.training.replay import Replay
    from gemma4_tpu.training.start import open_start, start_fingerprint

    config = loaded.root
    use_compile_cache(config.trainer.compile_cache)
    resume_from = hosts.from_first(lambda: resume.newest_verified(folder.checkpoints))

    # ── data ───────────────────────────────────────────────────────────────────────────────────────────────────────
    base = resolve_base(config.model)
    audit(base).enforce()
    start = open_start(config.lora, base.arch, resume_from)
    tokenizer = load_tokenizer(base.tokenizer_folder)
    data = build_data(config.data, tokenizer)

    # ── devices, and the rows that are this process's ──────────────────────────────────────────────────────────────
    mesh = start_mesh(config.hardware, config.mesh, base.arch)
    batches = make_batches(data, config.data, config.trainer, mesh)
    updates, length = batches.pipeline.total_updates, max(batches.pipeline.lengths)
    check_profile(config.trainer.profile, updates)
    if told := hosts.from_first(lambda: resume.nothing_left(folder, resume_from, updates)):
        log.info(told)
        return None
    if (warning := warmup_warning(config.optimizer, updates)) and warning not in loaded.checked.warnings:
        log.warning(warning)  # the number of updates follows from the data

    # ── the same on every host, and as the run began ───────────────────────────────────────────────────────────────
    fingerprints = {"base": base.fingerprint, **batches.pipeline.fingerprint}
    began_from = start_fingerprint(start, folder, resume_from)
    hosts.check_same(fingerprints | began_from, "give every host the same files and the same command")
    heldout = {"heldout": data.heldout.fingerprint["examples"]} if data.heldout else {}
    made_of = provenance.capture(
        hardware=provenance.hardware_of(config.hardware.name, mesh),
        seeds={"trainer": config.trainer.seed},
        fingerprints=fingerprints | began_from | heldout,
    )
    replay = Replay.begin(config.replay, config.replay_allow, folder, hosts, made_of)
    if resume_from is not None:
        resume.check(folder, resume_from, fingerprints, updates, config.optimizer, config.checkpoint)
    if folder.write:
        records.write_record(folder.data_path, records.DATA, data.to_json())

    # ── weights, adapters, optimizer ───────────────────────────────────────────────────────────────────────────────
    check_capacity(base.arch, config.lora, config.trainer, config.checkpoint, mesh, folder.checkpoints)
    trainer = resolve_remat(
        base.arch, config.hardware, config.lora, config.optimizer, config.trainer, mesh,
        rows=batches.rows, length=length, updates=updates,
    )  # fmt: skip
    job = build_job(
        base, config.lora, config.optimizer, trainer, mesh, updates, compiler_options(config.hardware), start
    )
    provenance.record(folder, made_of)
    folder.begun()
    if start is not None:
        start.tell(folder, base.fingerprint)
    answers = HeldoutAnswers(
        data.heldout, base, tokenizer, config.trainer, folder.path, resume_from, write=folder.write
    )  # fmt: skip
    return _loop(loaded, folder, preemption, job, batches, fingerprints, resume_from, replay, answers)


def _loop(
    loaded: Loaded[TrainRoot, Checked],
    folder: RunFolder,
    preemption: Preemption,
    job: Job,
    batches: Batches,
    fingerprints: dict[str, Any],
    resume_from: int | None,
    replay: Replay | None,
    answers: HeldoutAnswers,
) -> Result:
    """Runs the updates there are to run, under the eyes of a watchdog."""
    from gemma4_tpu.step.optimizer import make_schedule
    from gemma4_tpu.tracking.result import Result
    from gemma4_tpu.tracking.trackers import make_tracker, run_name
    from gemma4_tpu.training.checkpoint import Checkpoints
    from gemma4_tpu.training.compile_cache import log_compile_cache
    from gemma4_tpu.training.loop import Loop
    from gemma4_tpu.training.prediction import predict
    from gemma4_tpu.training.profile import Profile
    from gemma4_tpu.training.rates import Rates
    from gemma4_tpu.training.reports import Reports
    from gemma4_tpu.training.watchdog import Watchdog

    config, pipeline = loaded.root, batches.pipeline
    updates = pipeline.total_updates
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, job.trained_leaves, job.mesh)
    tracker = make_tracker(config.tracker, folder, asdict(config), name=run_name(config.name, loaded.overrides))
    reports = Reports(folder, tracker, replay, updates=updates, resume_from=resume_from)
    watchdog = Watchdog(
        config.trainer.stall_seconds,
        folder.log_path if folder.write else None,
        lambda reason: folder.leave_result(Result(status="failed", error=reason)),
    )
    loop = Loop(
        job, batches, checkpoints, config.trainer, config.checkpoint,
        schedule=make_schedule(config.optimizer, updates),
        rates=Rates.of(job.step.model.arch, config.lora, config.hardware, batches.mean_tokens, job.mesh),
        fingerprints=fingerprints,
        report=reports,
        flush=folder.push,
        preemption=preemption,
        watchdog=watchdog,
        sample=lambda trained, update: answers(job, trained, update, tracker),
        profile=Profile(config.trainer.profile, folder.path if folder.write else None),
        prediction=predict(config, job.step.model.remat, job.mesh.shape, folder.path) if folder.write else None,
    )  # fmt: skip
    with closing(pipeline), closing(checkpoints), closing(answers), reports, loop.profile.closing():
        with watchdog, reports.progress:
            result = loop.run(resume_from)
        log_compile_cache()
        reports.finish(result, checkpoints)
    return result


if __name__ == "__main__":
    sys.exit(main())
