"""What is wrong with `objective=`, by itself and with the rest of a training. No JAX here."""

from __future__ import annotations

from gemma4_tpu.config.schema import DataConfig, LoraConfig, ObjectiveConfig, TrainerConfig
from gemma4_tpu.data.forms import FORMS
from gemma4_tpu.step.objective_kinds import KINDS, SFT
from gemma4_tpu.training.optimizer_checks import kind_problems


def objective_problems(
    objective: ObjectiveConfig, data: DataConfig, lora: LoraConfig, trainer: TrainerConfig
) -> list[str]:
    """Keys that a kind does not have, or lacks; rows, tuning and a loop that it does not go with."""
    kind, name = KINDS.get(objective.kind), f"objective={objective.kind}"
    if kind is None:  # its choices say so
        return []
    messages = kind_problems("objective", objective, {name: one.keys for name, one in KINDS.items()})
    form = FORMS.get(data.format)
    if form is not None and form.rows != kind.rows:
        others = [other for other, one in KINDS.items() if one.rows == form.rows]
        messages.append(
            f"data.format={data.format}: its rows are {form.rows}, {name} takes {kind.rows}; give data=chat_jsonl"
            f" data.train=<your {kind.rows}>, or objective={' or '.join(others)}"
        )
    if kind.reference and not lora.enabled:
        messages.append(
            f"lora.enabled=false: {name} compares the model with what it began as, of which full fine-tuning would need"
            " a second copy; give lora.enabled=true, whose reference is the base without adapters"
        )
    if objective.kind != SFT and trainer.spike_factor is not None:
        messages.append(
            f"trainer.spike_factor={trainer.spike_factor}: losses of {name} have no baseline from which a spike stands"
            " out; give trainer.spike_factor=null"
        )
    return messages
