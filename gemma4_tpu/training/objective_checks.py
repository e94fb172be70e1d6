"""Problems with `objective=`, by itself and with the rest of a training run. Imports no JAX."""

from __future__ import annotations

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.checkpoint_folder import RANDOM
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.paths import local_place, no_folder
from gemma4_tpu.config.rollouts import is_address
from gemma4_tpu.config.schema import DataConfig, LoraConfig, ObjectiveConfig, TrainerConfig
from gemma4_tpu.data.forms import FORMS
from gemma4_tpu.step.objective_kinds import KINDS, MAY_BE_NULL, SFT
from gemma4_tpu.training.optimizer_checks import kind_problems


def objective_problems(
    objective: ObjectiveConfig, data: DataConfig, lora: LoraConfig, trainer: TrainerConfig
) -> list[str]:
    """Keys that a kind lacks or needs; rows, tuning and loop settings that are incompatible with it."""
    kind, name = KINDS.get(objective.kind), f"objective={objective.kind}"
    if kind is None:  # reported as an invalid choice
        return []
    messages = kind_problems("objective", objective, {name: one.keys for name, one in KINDS.items()}, MAY_BE_NULL)
    form = FORMS.get(data.format)
    if form is not None and form.rows != kind.rows:
        others = [other for other, one in KINDS.items() if one.rows == form.rows]
        messages.append(
            f"data.format={data.format}: its rows are {form.rows}, but {name} takes {kind.rows}; set data=chat_jsonl"
            f" data.train=<your {kind.rows}>, or objective={' or '.join(others)}"
        )
    if kind.reference and not lora.enabled:
        messages.append(
            f"lora.enabled=false: {name} compares the model with its initial values, so full fine-tuning would need"
            " a second copy; set lora.enabled=true, whose reference is the base without adapters"
        )
    if objective.kind != SFT and trainer.spike_factor is not None:
        messages.append(
            f"trainer.spike_factor={trainer.spike_factor}: losses of {name} have no baseline against which to detect"
            " a spike; set trainer.spike_factor=null"
        )
    if kind.taught and not kind.on_policy and data.image_cache is not None:
        messages.append(
            f"data.image_cache={data.image_cache}: the teacher of {name} reads text only; leave it out, or give"
            " objective=sft or one on pairs"
        )
    return messages + (_teacher(objective) if kind.taught else [])


def _teacher(objective: ObjectiveConfig) -> list[str]:
    """Problems with the teacher, as far as local files show."""
    path, which, name = objective.teacher, objective.teacher_checkpoint or "", objective.teacher_model
    if path and is_address(path):
        return _served(objective)
    messages = []
    if name is not None and name not in ARCHITECTURES:
        hint = did_you_mean(name, ARCHITECTURES, lambda one: f"objective.teacher_model={one}")
        messages.append(f"objective.teacher_model={name}: no such architecture{hint}")
    if which not in ("best", "latest") and not which.isdecimal():
        messages.append(f"objective.teacher_checkpoint={which}: give best, latest or the number of an update")
    if not path:
        return [
            *messages,
            f"objective.teacher: objective={objective.kind} needs a teacher; set a run folder or a checkpoint with the"
            " same vocabulary (local, gs:// or embedded:NAME); for a plan objective.teacher_model=<its size> will do",
        ]
    if path.startswith(RANDOM):
        if not name:
            messages.append(f"objective.teacher={path}: random weights of which model? Give objective.teacher_model=")
        return messages
    place, found = local_place(f"objective.teacher={path}", path)
    if place is not None and not place.is_dir():
        found.append(f"objective.teacher={path}: {no_folder(place)}; give a run folder or the folder of a checkpoint")
    return messages + found


def _served(objective: ObjectiveConfig) -> list[str]:
    """What is wrong with a server as the teacher."""
    if KINDS[objective.kind].on_policy:
        return [
            f"objective.teacher={objective.teacher}: objective={objective.kind} compares whole distributions at every"
            " update, and servers tell of a few tokens; give the checkpoint or the run folder that it serves, or"
            " objective=distill_offline"
        ]
    store = objective.teacher_store
    if not store:
        return ["objective.teacher_store: where is kept what it tells? Give a folder"]
    return [f"objective.teacher_store={store}: give a folder on this machine"] if "://" in store else []
