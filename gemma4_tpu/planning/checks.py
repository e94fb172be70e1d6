"""Checks of `python -m gemma4_tpu.plan`: those of training, except that weights and data need not exist. Imports no
JAX.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES, Architecture
from gemma4_tpu.checkpoint_folder import RANDOM, checkpoint_architecture, recognise, tokenizer_problem
from gemma4_tpu.config.limits import CHOICES
from gemma4_tpu.config.paths import no_folder
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.rollouts import is_address
from gemma4_tpu.config.schema import DataSource, LoraConfig
from gemma4_tpu.config.tasks import PlanConfig, PlanRoot
from gemma4_tpu.data.checks import HUGGING_FACE, source_problem
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES, MeshSizes, Slice, option_name, slice_of
from gemma4_tpu.planning.own_runs import band_of_runs
from gemma4_tpu.step.objective_kinds import KINDS
from gemma4_tpu.storage import list_folder
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.checks import examine_train, normalise, positions_problems
from gemma4_tpu.training.meshes import resolve_mesh
from gemma4_tpu.training.recipe import Recipe, TeacherModel, rows_per_microbatch
from gemma4_tpu.training.rollouts_checks import is_on_policy

LENGTHS = ("rows", "mean_tokens", "p99_tokens")
"""Keys of `plan` that stand for rows which can't be read here."""
UPDATES = 1_000
"""Length of the run in the program's learning-rate schedule: the same for all plans, so that runs with other rows or
epochs share a program. No figure depends on it.
"""

_NO_REWARD = "absent:absent"
"""Stands for the reward, which need not exist here."""


@dataclass(frozen=True)
class PlanChecked:
    """What the checks found out along the way."""

    architecture: Architecture
    slice: Slice
    mesh: MeshSizes
    data_here: bool
    """Tokenizer and rows are on this machine: lengths are measured, not assumed."""
    warnings: tuple[str, ...]
    """For the report; they changed nothing."""
    teacher: TeacherModel | None = None
    """For objectives that have one; without adapters, whose size is negligible."""
    missing: tuple[str, ...] = ()
    """Why the checkpoint's own numbers are unknown; those of `model.name` are planned with instead."""


def normalise_plan(root: PlanRoot) -> PlanRoot:
    """As for training; an unset batch becomes one row per place on the axes dp and fsdp and per microbatch."""
    root = cast(PlanRoot, normalise(root))
    trainer = root.trainer
    if trainer.global_batch_sequences is None and trainer.global_batch_tokens is None:
        rows = _row_places(root) * max(1, trainer.microbatches)
        return replace(root, trainer=replace(trainer, global_batch_sequences=rows))
    return root


def _row_places(root: PlanRoot) -> int:
    """Number of places among which rows are split; 1 if slice, model or mesh are refused later."""
    architecture, _ = _architecture(root)
    wanted = slice_of(root.hardware)
    if architecture is None or wanted is None:
        return 1
    try:
        return resolve_mesh(root.mesh, architecture, wanted.devices).row_places
    except UserError:
        return 1


def examine_plan(root: PlanRoot) -> tuple[PlanChecked | None, list[Refusal]]:
    """Checks everything that can be checked without compiling; `PlanChecked` is None if there are problems."""
    wanted = slice_of(root.hardware)
    messages = _compiler(root, wanted)
    if root.plan.utilization_low > root.plan.utilization_high:
        messages.append(
            f"plan.utilization_low={root.plan.utilization_low} is more than plan.utilization_high="
            f"{root.plan.utilization_high}; swap them"
        )
    if root.plan.p99_tokens < root.plan.mean_tokens:
        messages.append(f"plan.p99_tokens={root.plan.p99_tokens} is less than plan.mean_tokens={root.plan.mean_tokens}")
    if not root.plan.search_rows or min(root.plan.search_rows) < 1:
        messages.append(f"plan.search_rows={root.plan.search_rows}: give numbers of rows, such as [1,2,4]")
    choices = CHOICES["hardware.flags"]
    if not root.plan.search_flags or not set(root.plan.search_flags) <= set(choices):
        messages.append(f"plan.search_flags={root.plan.search_flags}: give some of [{', '.join(choices)}]")
    messages += _calibration(root, wanted)
    architecture, missing = _architecture(root)
    messages += positions_problems(root.data, architecture)
    teacher, unknown = _teacher(root)
    messages += unknown
    # The rest is checked as for training, on a run whose files are assumed to exist.
    model = replace(root.model, path=f"{RANDOM}0", tokenizer=None)
    data = replace(root.data, train=[DataSource(path="hf:absent")], heldout=[])
    rollouts = root.rollouts
    if is_on_policy(root.objective):
        rollouts = replace(rollouts, reward=_NO_REWARD, recorded=None)
    objective = root.objective
    if teacher is not None:
        objective = replace(objective, teacher=f"{RANDOM}0", teacher_model=teacher.arch.name)
    checked, problems = examine_train(
        replace(root, model=model, data=data, rollouts=rollouts, objective=objective)
    )  # fmt: skip
    problems = [Refusal(message) for message in messages] + problems
    if problems or checked is None or architecture is None or wanted is None or checked.mesh is None:
        return None, problems
    warnings = [w for w in checked.warnings if "held-out" not in w and _NO_REWARD not in w]
    if missing:
        warnings.append(f"{'; '.join(missing)}: planned with the numbers of {architecture.name}")
    if is_on_policy(root.objective) and root.rollouts.reward is not None:
        warnings.append(f"objective={root.objective.kind}: planned without rewards, computed while it decodes")
    data_here = _data_here(root)
    if not data_here:
        warnings += _unread(root)
    return PlanChecked(architecture, wanted, checked.mesh, data_here, tuple(warnings), teacher, tuple(missing)), []


def recipe_of(root: PlanRoot, checked: PlanChecked) -> Recipe:
    """The step of a configuration that passed the checks."""
    return Recipe(
        arch=checked.architecture, hardware=root.hardware, lora=root.lora, optimizer=root.optimizer,
        trainer=root.trainer, mesh=checked.mesh,
        rows=rows_per_microbatch(root.trainer, root.data, checked.mesh.row_places),
        length=root.data.sequence_length, updates=UPDATES, new_tokens=tuple(range(len(root.model.new_tokens))),
        objective=root.objective, teacher=checked.teacher,
    )  # fmt: skip


def _compiler(root: PlanRoot, wanted: Slice | None) -> list[str]:
    tpus = ", ".join(option_name(s.name) for s in SLICES.values() if s.topology)
    if root.hardware.name == LOCAL:
        return [f"hardware=local: plans are for TPU slices; give hardware=<slice> ({tpus})"]
    if wanted is not None and wanted.topology is None:
        return [f"hardware={option_name(wanted.name)}: only TPU slices can be planned ({tpus})"]
    if importlib.util.find_spec("libtpu") is None:
        return ["planning compiles with libtpu, which is not installed: pip install 'gemma4-tpu[tpu]'"]
    return []


def _calibration(root: PlanRoot, wanted: Slice | None) -> list[str]:
    """Runs that would calibrate nothing, before minutes of compilation."""
    place = root.plan.calibration
    if place is None or wanted is None:
        return []
    if not root.plan.schedule and not root.plan.search:
        return [f"plan.calibration={place}: a band around the schedule; give plan.schedule=true, or leave it out"]
    if not Path(place).is_dir():
        return [f"plan.calibration={place}: {no_folder(Path(place))}; give a run folder, or a folder of them"]
    try:
        band_of_runs(Path(place), wanted.chip)
    except UserError as error:
        return [str(error)]
    return []


def _unread(root: PlanRoot) -> list[str]:
    """A warning if the lengths of the user's own rows are not measured; `plan.*` describes CodeV-R1's."""
    plan, paths = root.plan, [source.path for source in root.data.train if source.path]
    stated = any(getattr(plan, key) != getattr(PlanConfig(), key) for key in LENGTHS)
    if stated or not paths or root.trainer.max_updates is not None:
        return []
    if root.data.format == "codev_r1":
        whole = f"CodeV-R1 has about 87,000 rows; minutes and dollars are those of {plan.rows:,} (data.max_rows=10000)"
        return [f"data.max_rows=null: {whole}"] if root.data.max_rows is None else []
    absent = next((problem for s in root.data.train for problem in source_problem("data.train", s)), None)
    if absent is None:
        near = not any("://" in path or path.startswith(HUGGING_FACE) for path in paths)
        absent = f"data.train={', '.join(paths)}: not " + (
            "tokenised, because no tokenizer is here (model.tokenizer=<folder>)" if near else "read from afar"
        )
    return [
        f"{absent}: minutes and dollars are those of {plan.rows:,} rows of {plan.mean_tokens:g} tokens; give plan.rows,"
        " plan.mean_tokens and plan.p99_tokens"
    ]


def _architecture(root: PlanRoot) -> tuple[Architecture | None, list[str]]:
    """The checkpoint's architecture if readable, else that of `model.name`; and what is missing."""
    model = root.model if root.model.path is not None else replace(root.model, path=f"{RANDOM}0")
    return checkpoint_architecture(model, pictures=root.data.image_cache is not None)


def _teacher(root: PlanRoot) -> tuple[TeacherModel | None, list[str]]:
    """The teacher's architecture, as named or as read from its folder; and why it is unknown, if it is."""
    objective, kind = root.objective, KINDS.get(root.objective.kind)
    if kind is None or not kind.taught or (objective.teacher is None and objective.teacher_model is None):
        return None, []  # the checks of training require one, and know the names
    if is_address(objective.teacher or ""):
        return None, []  # it takes no device of the run
    name, given = objective.teacher_model, f"objective.teacher={objective.teacher}"
    try:
        if name is None:
            name = _name_of(str(objective.teacher))
    except (UserError, OSError) as error:
        return None, [f"{given}: {error}; name its architecture: objective.teacher_model=gemma4_31b"]
    known = ARCHITECTURES.get(name)
    return (TeacherModel(known, LoraConfig(enabled=False)) if known else None), []


def _name_of(place: str) -> str:
    """Name of the architecture of a checkpoint or of a run's base."""
    folder = assets.resolve(place)
    if "config.yaml" in list_folder(folder):
        return str(RunFolder.existing(folder).read_config()["model"]["name"])
    return recognise(folder)


def _data_here(root: PlanRoot) -> bool:
    """Whether rows and the model's own tokenizer can be read on this machine."""
    if root.model.path is None and root.model.tokenizer is None:
        return False
    paths = [root.model.tokenizer or root.model.path or "", *(source.path for source in root.data.train)]
    if any("://" in path or path.startswith(HUGGING_FACE) for path in paths):
        return False
    model = root.model if root.model.path is not None else replace(root.model, path=f"{RANDOM}0")
    return not tokenizer_problem(model) and not any(source_problem("data.train", s) for s in root.data.train)
