"""The main job of `train`, top to bottom: rows and devices → the record → weights → updates → result."""

from __future__ import annotations

import hashlib
import logging
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.config.durations import seconds_of
from gemma4_tpu.config.load import Loaded
from gemma4_tpu.config.rollouts import is_address
from gemma4_tpu.config.schema import TrainRoot
from gemma4_tpu.data.build import TrainingData, build_data
from gemma4_tpu.data.picture_cache import FeatureCache, Shown
from gemma4_tpu.data.seen import feature_cache, picture_reader, shown_with
from gemma4_tpu.data.tokenise import let_go
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.evals.generate import checkpoint_stop_ids
from gemma4_tpu.evals.heldout import HeldoutAnswers
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.models.adapted import takes_part
from gemma4_tpu.models.audit import audit
from gemma4_tpu.models.base import Base, resolve_base
from gemma4_tpu.models.lora import factors
from gemma4_tpu.planning.auto_remat import resolve_remat
from gemma4_tpu.rollouts.assembly import begin, make_source
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.served_teacher import ServedTeacher
from gemma4_tpu.rollouts.source import OnPolicySource
from gemma4_tpu.rollouts.teacher import Teacher, open_teacher
from gemma4_tpu.step.objective import TEACHER
from gemma4_tpu.step.objective_kinds import KINDS, rows_of
from gemma4_tpu.step.optimizer import make_schedule
from gemma4_tpu.storage import Deadline
from gemma4_tpu.tracking import provenance
from gemma4_tpu.tracking.bucket import CHECKPOINTS
from gemma4_tpu.tracking.files import write_json
from gemma4_tpu.tracking.provenance import Provenance
from gemma4_tpu.tracking.result import Result
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.tracking.trackers import make_tracker, run_name
from gemma4_tpu.training import resume
from gemma4_tpu.training.batches import Batches, make_batches
from gemma4_tpu.training.began import FOLDER, REFERENCE_FOLDER, open_began, open_reference
from gemma4_tpu.training.checkpoint import Checkpoints, Refuge
from gemma4_tpu.training.checks import Checked, warmup_warning
from gemma4_tpu.training.compile_cache import log_compile_cache, use_compile_cache
from gemma4_tpu.training.endings import TimeLimit, check_patience
from gemma4_tpu.training.hosts import Hosts
from gemma4_tpu.training.loop import Loop
from gemma4_tpu.training.prediction import predict
from gemma4_tpu.training.preemption import Preemption
from gemma4_tpu.training.profile import Profile, check_profile
from gemma4_tpu.training.rates import Rates
from gemma4_tpu.training.recipe import Recipe, check_lengths, check_positions, rows_per_microbatch
from gemma4_tpu.training.replay import Replay
from gemma4_tpu.training.reports import Reports
from gemma4_tpu.training.rollouts_checks import check_decoding_mesh, is_on_policy
from gemma4_tpu.training.setup import Setup, check_capacity, rows_here, set_up, start_mesh
from gemma4_tpu.training.start import Start, open_start, start_fingerprint
from gemma4_tpu.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What one start of a training run is made of, before there are weights."""

    config: TrainRoot
    overrides: list[str]
    folder: RunFolder
    hosts: Hosts
    resume_from: int | None
    """The update whose checkpoint it resumes from."""
    base: Base
    start: Start | None
    """Adapters to begin from, where `lora.start` names some."""
    tokenizer: Any
    data: TrainingData
    mesh: Mesh
    batches: Batches
    teacher: Teacher | None

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.batches.source.total_updates

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """Of base, tokenizer and rows; saved with every checkpoint."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.found.identity}
        return {"base": self.base.fingerprint, **teacher, **self.batches.source.fingerprint}

    def recipe(self) -> Recipe:
        """The step, with the remat policy that was asked for."""
        config = self.config
        return Recipe(
            arch=self.base.arch, hardware=config.hardware, lora=config.lora, optimizer=config.optimizer,
            trainer=config.trainer, mesh=MeshSizes(**self.mesh.shape), rows=self.batches.rows,
            length=max(self.batches.source.lengths), updates=self.updates,
            new_tokens=tuple(self.base.token_places.ids.values()), objective=config.objective,
            teacher=self.teacher.model if self.teacher else None,
        )  # fmt: skip


def train(loaded: Loaded[TrainRoot, Checked], folder: RunFolder, hosts: Hosts, preemption: Preemption) -> Result | None:
    """The result; None where nothing is left to do.

    Raises:
      UserError: what files, devices or an earlier start of the run forbid.
    """
    config, time_limit = loaded.root, TimeLimit(loaded.root.trainer.time_limit, hosts)
    use_compile_cache(config.trainer.compile_cache)
    resume_from = hosts.from_first(lambda: resume.newest_verified(folder.checkpoints))

    # ── what is read: the base, adapters to begin from, the tokenizer, rows ────────────────────────────────────────
    base = resolve_base(config.model, pictures=config.data.image_cache is not None)
    audit(base).enforce()
    start = open_start(config.lora, base.arch, resume_from)
    tokenizer = load_tokenizer(base.tokenizer_folder, base.new_tokens)
    taught, served = KINDS[config.objective.kind].taught, is_address(config.objective.teacher or "")
    teacher = open_teacher(config.objective, base, tokenizer) if taught and not served else None
    cache = feature_cache(base, config.data, (hosts.index, hosts.count))
    keep = cache.ensure if cache else let_go
    data = build_data(config.data, tokenizer, rows_of(config.objective), picture_reader(base, config.data), keep)
    shown = _shown(base, cache, data, hosts) if cache else None
    if taught and served:
        data = _told(ServedTeacher(config.objective, tokenizer), data, hosts)

    # ── devices, and the rows that are this process's ──────────────────────────────────────────────────────────────
    mesh = start_mesh(config.hardware, config.mesh, base.arch)
    own = _own_answers(config, mesh, data, tokenizer, base) if is_on_policy(config.objective) else None
    batches = make_batches(data, config.data, config.trainer, mesh, own, shown)
    check_lengths(batches.lengths, MeshSizes(**mesh.shape))
    check_positions(batches.lengths, base.arch)
    run = Run(
        config, loaded.overrides, folder, hosts, resume_from, base, start, tokenizer, data, mesh, batches, teacher
    )  # fmt: skip
    check_profile(config.trainer.profile, run.updates)
    check_patience(config.trainer, bool(batches.heldout))
    if told := hosts.from_first(lambda: resume.nothing_left(folder, resume_from, run.updates, config.trainer)):
        log.info(told)
        return None
    if (warning := warmup_warning(config.optimizer, run.updates)) and warning not in loaded.checked.warnings:
        log.warning(warning)  # the number of updates follows from the data

    # ── the same on every host, and as the run began ───────────────────────────────────────────────────────────────
    made_of = _made_of(run)
    replay = Replay.begin(config.replay, config.replay_allow, folder, hosts, made_of)
    if resume_from is not None:
        resume.check(folder, resume_from, run.fingerprints, run.updates, config.optimizer, config.checkpoint)
    if folder.write:
        write_json(folder.data_path, data.to_json())

    # ── weights, adapters, optimizer; only now is the run one that has begun ───────────────────────────────────────
    check_capacity(run.recipe(), config.checkpoint, mesh, folder.checkpoints)
    recipe = resolve_remat(run.recipe(), mesh)
    setup = _set_up(run, recipe)
    provenance.record(folder, made_of)
    folder.begun()
    if start is not None:
        start.tell(folder, base.fingerprint)
    return _loop(run, recipe, setup, replay, preemption, time_limit)


def _shown(base: Base, cache: FeatureCache, data: TrainingData, hosts: Hosts) -> Shown:
    """The features of all pictures, once each process has made its share of them."""
    log.info("%s", cache.told())
    hosts.check_same({"rows": data.train.fingerprint["examples"]}, "give every host the same files")  # and wait for all
    return shown_with(base, cache, data, hosts.count)


def _told(teacher: ServedTeacher, data: TrainingData, hosts: Hosts) -> TrainingData:
    """The rows with what a served teacher tells of them. One process after the other, so that those with a common store
    ask nothing again.
    """
    for index in range(hosts.count):
        if index == hosts.index:
            train, heldout = teacher.tell(data.train), data.heldout and teacher.tell(data.heldout)
        hosts.check_same({"rows": data.train.fingerprint["examples"]}, "give every host the same files")  # and wait
    return replace(data, train=train, heldout=heldout)


def _own_answers(
    config: TrainRoot, mesh: Mesh, data: TrainingData, tokenizer: Any, base: Base
) -> OnPolicySource:  # fmt: skip
    """The source of an on-policy run, which is made ready once there are weights."""
    sizes = MeshSizes(**mesh.shape)
    check_decoding_mesh(sizes, base.arch)
    rows = rows_per_microbatch(config.trainer, config.data, sizes.row_places)
    return make_source(
        config.objective.kind, config.rollouts, config.trainer, config.data, rows, data.train, tokenizer,
        rows_here(mesh, rows),
    )  # fmt: skip


def _made_of(run: Run) -> Provenance:
    """Code, packages, machine, seeds and fingerprints, which must be the same on every host."""
    began_from = start_fingerprint(run.start, run.folder, run.resume_from)
    came_in = run.fingerprints | began_from
    run.hosts.check_same(came_in, "give every host the same files and the same command")
    heldout = {"heldout": run.data.heldout.fingerprint["examples"]} if run.data.heldout else {}
    return provenance.capture(
        hardware=provenance.hardware_of(run.config.hardware.name, run.mesh),
        seeds={"trainer": run.config.trainer.seed},
        fingerprints=came_in | heldout,
    )


def _set_up(run: Run, recipe: Recipe) -> Setup:
    """Weights, adapters and optimizer on the mesh, also a teacher's weights and what a resumed run began from."""
    lora, checkpoints, resumes = run.config.lora, run.folder.checkpoints, run.resume_from is not None
    began = open_began(checkpoints) if resumes and takes_part(lora) else None
    reference = open_reference(checkpoints) if resumes and recipe.keeps_reference else None
    setup = set_up(run.base, recipe, run.mesh, run.start, began, reference)
    if run.teacher is None:
        return setup
    teacher = run.teacher.weights(run.mesh, run.config.trainer.compute_dtype)
    return replace(setup, base={**setup.base, TEACHER: teacher})


def _sampled_model(run: Run, setup: Setup) -> str:
    """See `OnPolicyRun.model`."""
    model = setup.step.model
    dtype, quantize = np.dtype(model.compute_dtype).name, run.config.lora.quantize
    made_of = run.fingerprints["base"], run.fingerprints["prompts"], dtype, quantize, model.layout.of_layers
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


def _loop(
    run: Run, recipe: Recipe, setup: Setup, replay: Replay | None, preemption: Preemption, time_limit: TimeLimit
) -> Result:
    """Runs the updates there are to run, with a stall watchdog."""
    config, folder, source = run.config, run.folder, run.batches.source
    seconds = seconds_of(config.storage.deadline) or 0.0  # the limits know that it can be read
    deadline = Deadline(seconds, "storage.deadline", lambda: preemption.requested)
    refuge = Refuge(folder.path / CHECKPOINTS, deadline, folder.push, folder.forget_bucket)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, setup.trained_leaves, setup.mesh, refuge)
    if run.resume_from is None:
        if takes_part(config.lora):
            checkpoints.save_initial(FOLDER, setup.state.trained, factors(setup.step.model.layout))
        if recipe.keeps_reference:
            checkpoints.save_initial(REFERENCE_FOLDER, setup.state.trained, setup.trained_leaves)
    answers = HeldoutAnswers(
        run.data.heldout, run.base, run.tokenizer, config.trainer, folder.path, run.resume_from, write=folder.write,
        shown=run.batches.shown,
    )  # fmt: skip
    tracker = make_tracker(config.tracker, folder, asdict(config), name=run_name(config.name, run.overrides))
    first_measure = next(iter(KINDS[config.objective.kind].measures), None)
    reports = Reports(
        folder, tracker, replay, updates=run.updates, resume_from=run.resume_from, beside_loss=first_measure
    )
    watchdog = Watchdog(
        config.trainer.stall_seconds,
        folder.log_path if folder.write else None,
        lambda reason: folder.leave_result(Result(status="failed", error=reason)),
    )
    loop = Loop(
        setup, run.batches, checkpoints, config.trainer, config.checkpoint,
        schedule=make_schedule(config.optimizer, run.updates),
        rates=Rates.of(recipe, run.batches.segment_tokens, setup.mesh),
        fingerprints=run.fingerprints,
        report=reports,
        preemption=preemption,
        time_limit=time_limit,
        watchdog=watchdog,
        sample=lambda trained, update: answers(setup, trained, update, tracker),
        profile=Profile(config.trainer.profile, folder.path if folder.write else None),
        history=reports.history if folder.write else None,
        prediction=predict(recipe, config.trainer.plan, folder.path) if folder.write else None,
    )  # fmt: skip
    with closing(source), closing(checkpoints), closing(answers), reports, loop.profile.closing():
        if isinstance(source, OnPolicySource):
            drawn_for = OnPolicyRun(
                config.rollouts, folder.path, config.trainer.seed, _sampled_model(run, setup), run.resume_from,
                run.hosts, watchdog.progress,
            )  # fmt: skip
            begin(
                source, drawn_for, setup.step, setup.base, run.tokenizer, checkpoint_stop_ids(run.base, run.tokenizer),
                report=reports, show=tracker.table,
            )  # fmt: skip
        with watchdog, reports.progress:
            result = loop.run(run.resume_from)
        log_compile_cache()
        reports.finish(result, checkpoints)
    return result
