"""Checks across a training configuration's fields: ranges, choices, files, batch sizes and the mesh. Imports no
JAX.

`examine_train` finds everything that can be known before an accelerator runtime starts. Once JAX has reported its
devices, `meshes.resolve_mesh`, `recipe.rows_per_microbatch` and `hardware_checks.check_devices` check again.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path

from gemma4_tpu import new_tokens
from gemma4_tpu.architectures import ARCHITECTURES, Architecture
from gemma4_tpu.checkpoint_folder import checkpoint_architecture, tokenizer_problem
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.limits import limit_problems
from gemma4_tpu.config.machines import MeshConfig
from gemma4_tpu.config.outputs import TrackerConfig
from gemma4_tpu.config.paths import at_home, folder_of, local_place, name_problem, no_folder, remote_problem
from gemma4_tpu.config.refusals import Refusal
from gemma4_tpu.config.schema import DataConfig, LoraConfig, OptimizerConfig, TrainerConfig, TrainRoot
from gemma4_tpu.data.checks import CHOICES, data_problems
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes, slice_of
from gemma4_tpu.models import in_full
from gemma4_tpu.step.warmup import warmup_updates
from gemma4_tpu.storage import is_remote
from gemma4_tpu.tracking.tracker import PACKAGES
from gemma4_tpu.training.hardware_checks import full_problems, hardware_problems, price_warning
from gemma4_tpu.training.lora_checks import EXPERTS, adapted_problems, lora_problems, without_effect
from gemma4_tpu.training.meshes import resolve_mesh, whole_rows_problems
from gemma4_tpu.training.objective_checks import objective_problems
from gemma4_tpu.training.optimizer_checks import optimizer_problems, stop_problems, trained_bytes, undecayed
from gemma4_tpu.training.recipe import (
    batch_key,
    check_lengths,
    check_positions,
    count,
    rows_per_microbatch,
    rows_per_update,
)
from gemma4_tpu.training.rollouts_checks import (
    check_decoding_mesh,
    is_on_policy,
    reward_of,
    rollouts_problems,
    undivided,
    unused,
)

HIGH_LEARNING_RATE = 1e-3
"""Higher than LoRA on a released size usually tolerates; reported, never changed."""
PARTS = ("code", "packages", "data", "tokenizer", "base", "hardware")
"""Parts that a replay compares with the record; `replay_allow` accepts these names."""


@dataclass(frozen=True)
class Checked:
    """What the checks found out along the way."""

    architecture: Architecture
    """From the checkpoint's `config.json` if readable, else from `model.name`."""
    mesh: MeshSizes | None
    """None with `hardware=local`, until JAX has counted its devices."""
    warnings: tuple[str, ...]
    """For the report; they changed nothing."""


def normalise(root: TrainRoot) -> TrainRoot:
    """Canonical spelling of values with several spellings: `packing: false`, `quantize: none`, `~/rows.jsonl`; and the
    default reward.
    """
    quantize = None if root.lora.quantize in ("none", "null") else root.lora.quantize
    train, heldout = (
        [replace(source, path=at_home(source.path)) for source in sources]
        for sources in (root.data.train, root.data.heldout)
    )
    return replace(
        root,
        model=replace(root.model, path=at_home(root.model.path), tokenizer=at_home(root.model.tokenizer)),
        data=replace(
            root.data,
            packing=root.data.packing.strip().lower(),
            train=train,
            heldout=heldout,
            image_cache=folder_of(root.data.image_cache),
        ),
        lora=replace(
            root.lora,
            quantize=quantize,
            start=folder_of(root.lora.start),
            start_checkpoint=root.lora.start_checkpoint.strip().lower(),
        ),
        objective=replace(
            root.objective,
            teacher=folder_of(root.objective.teacher),
            teacher_store=folder_of(root.objective.teacher_store),
        ),
        rollouts=replace(
            root.rollouts,
            reward=reward_of(root.objective, root.rollouts),
            problems_path=folder_of(root.rollouts.problems_path),
            recorded=folder_of(root.rollouts.recorded),
        ),
        run_dir=at_home(root.run_dir),
        replay=at_home(root.replay),
    )


def examine_train(root: TrainRoot) -> tuple[Checked | None, list[Refusal]]:
    """Checks everything that can be checked without JAX; returns the findings, or the problems."""
    messages = limit_problems(root, CHOICES)
    messages += _lengths(root.trainer) + _batch(root.trainer, root.data) + lora_problems(root.lora)
    messages += optimizer_problems(root.optimizer, root.trainer) + stop_problems(root.trainer)
    messages += objective_problems(root.objective, root.data, root.lora, root.trainer)
    messages += rollouts_problems(root.objective, root.rollouts, root.data, root.lora)
    messages += data_problems(root.data) + _tracker(root.tracker) + _run(root)
    architecture, model_messages = checkpoint_architecture(root.model, pictures=root.data.image_cache is not None)
    messages += model_messages
    if not model_messages:
        messages += tokenizer_problem(root.model)
    if architecture is not None and root.lora.enabled:
        messages += in_full.problems(architecture, root.lora)
    if architecture is not None and not any(message.startswith("lora.") for message in messages):
        messages += adapted_problems(root.lora, architecture)
    messages += positions_problems(root.data, architecture)
    mesh, mesh_messages = _mesh(root, architecture)
    messages += mesh_messages
    if root.trainer.attention == "splash" and architecture is not None:
        messages += _splash(architecture, root.data, root.mesh.cp)
    if root.trainer.sample_prompts:
        messages += whole_rows_problems(
            root.mesh.cp, f"trainer.sample_prompts={root.trainer.sample_prompts} decodes answers"
        )
    if EXPERTS in root.lora.targets and root.lora.enabled and architecture is not None and not architecture.num_experts:
        there = ", ".join(name for name, other in ARCHITECTURES.items() if other.num_experts)
        messages.append(f"lora.targets: experts, but {architecture.name} has none ({there} have); leave them out")
    messages += new_tokens.problems(root.model.new_tokens)
    if messages or architecture is None:
        return None, [Refusal(m) for m in messages]
    return Checked(architecture, mesh, tuple(_warnings(root, mesh))), []


def warmup_warning(optimizer: OptimizerConfig, updates: int) -> str | None:
    """A warning if the warm-up takes more than a tenth of the run's updates; else None."""
    warmup = warmup_updates(optimizer, updates)
    if warmup * 10 <= updates:
        return None
    return f"optimizer.warmup_updates={warmup} is more than a tenth of the run's {updates} updates" + (
        "; the peak learning rate is never reached" if warmup >= updates else ""
    )


def _lengths(trainer: TrainerConfig) -> list[str]:
    endless = trainer.max_updates is None and trainer.epochs is None
    messages = ["trainer.max_updates, trainer.epochs: set one of them; both are null"] if endless else []
    tokens, sequences = trainer.global_batch_tokens, trainer.global_batch_sequences
    names = ("trainer.global_batch_tokens", "trainer.global_batch_sequences")
    if tokens is None and sequences is None:
        messages.append(f"{names[0]}, {names[1]}: set exactly one; both are null")
    elif tokens is not None and sequences is not None:
        messages.append(
            f"{names[0]}={tokens}, {names[1]}={sequences}: set one of them; add {names[1]}=null or {names[0]}=null"
        )
    return messages


def _batch(trainer: TrainerConfig, data: DataConfig) -> list[str]:
    tokens, sequences = trainer.global_batch_tokens, trainer.global_batch_sequences
    if (tokens is None) == (sequences is None) or min(tokens or 1, sequences or 1, trainer.microbatches) < 1:
        return []
    length = max(1, data.sequence_length)
    if tokens is not None and tokens % length:
        nearest = length * max(1, round(tokens / length))
        return [
            f"trainer.global_batch_tokens={tokens}: not a multiple of data.sequence_length={length}; "
            f"{nearest} is ({count(nearest // length, 'row')})"
        ]
    rows = rows_per_update(trainer, data)
    if rows % trainer.microbatches:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        return [
            f"trainer.microbatches={trainer.microbatches}: does not divide the {count(rows, 'row')} of an update "
            f"({batch_key(trainer)}); it could be {', '.join(map(str, divisors))}"
        ]
    return []


def _row_lengths(data: DataConfig) -> list[int]:
    return [data.sequence_length, *(data.buckets or [])]


def positions_problems(data: DataConfig, architecture: Architecture | None) -> list[str]:
    """Rows longer than the model's sequences; of a checkpoint that can't be read yet, none."""
    try:
        if architecture is not None:
            check_positions(_row_lengths(data), architecture)
    except UserError as error:
        return [str(error)]
    return []


def _splash(architecture: Architecture, data: DataConfig, cp: int) -> list[str]:
    """The TPU kernel needs multiples of 128 lanes, in each of two parts of a row per chip on the axis cp."""
    multiple = 128 if cp == 1 else 256 * cp
    widths = sorted({architecture.head_dim, architecture.global_head_dim})
    odd = [f"{architecture.name}'s head widths {widths}"] if any(width % 128 for width in widths) else []
    lengths = _row_lengths(data)
    odd += [f"data.sequence_length or data.buckets {lengths}"] if any(length % multiple for length in lengths) else []
    if not odd:
        return []
    multiples = "128" if multiple == 128 else f"128, lengths of {multiple}"
    return [
        f"trainer.attention=splash: {' and '.join(odd)} must be multiples of {multiples}; give trainer.attention=auto"
    ]


def _tracker(tracker: TrackerConfig) -> list[str]:
    module, installed_by = PACKAGES.get(tracker.kind, (None, None))
    if module and importlib.util.find_spec(module) is None:
        return [f"tracker.kind={tracker.kind}: the package {module} is not installed; pip install {installed_by}"]
    return []


def _run(root: TrainRoot) -> list[str]:
    each = trained_bytes(root.optimizer, root.trainer)
    messages = hardware_problems(root.hardware) + full_problems(root.hardware, root.lora, root.model.name, each)
    wanted = slice_of(root.hardware)
    if wanted and wanted.chip.platform != "tpu" and root.trainer.attention == "splash":
        messages.append(
            f"trainer.attention=splash: a TPU kernel, but {wanted.name} has GPUs; give auto, chunked or einsum"
        )
    messages += name_problem(root.name)
    if root.lora.start is not None and not _goes_on(root.run_dir):
        messages += _start(root.lora)
    messages += _watched(root.trainer) + _replay(root.replay, root.replay_allow, root.run_dir)
    return messages + _folder(root.run_dir)


def _folder(run_dir: str | None) -> list[str]:
    if run_dir is not None and "://" in run_dir:
        return remote_problem(f"run_dir={run_dir}", run_dir)
    if run_dir is not None and Path(run_dir).is_file():
        return [f"run_dir={run_dir}: is a file; give a folder, new or of a run to resume"]
    return []


def _start(lora: LoraConfig) -> list[str]:
    """Problems with `lora.start` and its checkpoint, as far as local files show."""
    path, which = lora.start or "", lora.start_checkpoint
    messages = []
    if which not in ("best", "latest") and not which.isdecimal():
        messages.append(f"lora.start_checkpoint={which}: give best, latest or the number of an update")
    place, found = local_place(f"lora.start={path}", path)
    if place is not None and not place.is_dir():
        found.append(f"lora.start={path}: {no_folder(place)}; give a run folder or the folder of a PEFT adapter")
    return messages + found


def _replay(run: str | None, allow: list[str], run_dir: str | None) -> list[str]:
    """Problems with the combination of `replay`, `replay_allow` and `run_dir`."""
    if run is None:
        return [f"replay_allow=[{','.join(allow)}]: only with replay=<run folder>"] if allow else []
    messages = [
        f"replay_allow: {name!r} is not a part that is compared{did_you_mean(name, PARTS)} (there are"
        f" {', '.join(PARTS)})"
        for name in allow
        if name not in PARTS
    ]
    if run_dir is not None and _place(run_dir) == _place(run):
        messages.append(f"run_dir={run_dir}: holds the run to repeat; give another run_dir")
    return messages


def _place(folder: str) -> str:
    return folder.rstrip("/") if is_remote(folder) else str(Path(folder).expanduser().resolve())


def _watched(trainer: TrainerConfig) -> list[str]:
    """An invalid range of updates to record, or a missing plan."""
    messages = []
    if trainer.profile is not None:
        last = trainer.max_updates or math.inf
        if len(trainer.profile) != 2 or not 1 <= trainer.profile[0] <= trainer.profile[1] <= last:
            messages.append(
                f"trainer.profile={trainer.profile}: give [first,last], two updates from 1 to "
                f"{trainer.max_updates or 'the last'}, or null"
            )
    if trainer.plan is not None and not Path(trainer.plan).exists():
        messages.append(f"trainer.plan={trainer.plan}: there is no such folder or file")
    return messages


def _below_one(mesh: MeshConfig) -> bool:
    """Refused by its limits already; there is no mesh to look for."""
    return any(size is not None and size < 1 for size in vars(mesh).values())


def _mesh(root: TrainRoot, architecture: Architecture | None) -> tuple[MeshSizes | None, list[str]]:
    wanted = slice_of(root.hardware)
    if wanted is None or architecture is None or _below_one(root.mesh):
        return None, []
    try:
        sizes = resolve_mesh(root.mesh, architecture, wanted.devices)
        if is_on_policy(root.objective):
            check_decoding_mesh(sizes, architecture)
        check_lengths(_row_lengths(root.data), sizes)
    except UserError as error:
        return None, [str(error)]
    if _lengths(root.trainer) or _batch(root.trainer, root.data) or root.trainer.microbatches < 1:
        return sizes, []
    try:
        rows_per_microbatch(root.trainer, root.data, sizes.row_places)
    except UserError as error:
        return None, [str(error)]
    return sizes, []


def _warnings(root: TrainRoot, mesh: MeshSizes | None) -> list[str]:
    lines = []
    if root.optimizer.learning_rate > HIGH_LEARNING_RATE and not root.model.name.startswith("tiny"):
        lines.append(
            f"optimizer.learning_rate={root.optimizer.learning_rate} suits the tiny models; LoRA on {root.model.name} "
            "usually takes 1e-4 to 5e-4"
        )
    if root.trainer.max_updates is not None:
        line = warmup_warning(root.optimizer, root.trainer.max_updates)
        lines += [line] if line else []
    if not root.data.heldout and not root.data.heldout_fraction:
        lines.append(
            "no held-out rows: no held-out loss, no best checkpoint (data.heldout=[], data.heldout_fraction=0)"
        )
    if root.lora.enabled and root.lora.dropout and EXPERTS in root.lora.targets:
        lines.append(f"lora.dropout={root.lora.dropout}: adapters of experts have none (nor do PEFT's); the others do")
    lines += [*without_effect(root.lora), *undecayed(root.optimizer), *unused(root.objective, root.rollouts)]
    if mesh is not None and is_on_policy(root.objective):
        lines += undivided(root.rollouts, mesh)
    if (line := price_warning(root.hardware)) is not None:
        lines.append(line)
    return lines


def _goes_on(run_dir: str | None) -> bool:
    """Whether a local run folder holds a resumable run, which no longer needs the origin of its adapters."""
    return run_dir is not None and (Path(run_dir) / "config.yaml").is_file()
