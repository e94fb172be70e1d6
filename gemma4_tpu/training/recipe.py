"""The ingredients of a training step, and how a batch divides over a mesh. Imports no JAX."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.config.schema import DataConfig, LoraConfig, ObjectiveConfig, OptimizerConfig, TrainerConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes, slice_of
from gemma4_tpu.models.adapted import expert_rank, takes_part
from gemma4_tpu.step.objective_kinds import KINDS


class TeacherModel(NamedTuple):
    """A model that a distillation runs forward next to its own."""

    arch: Architecture
    lora: LoraConfig
    """Its adapters; `enabled=False`: none."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training step before there are devices: training runs it, planning compiles it without weights.

    The mesh, of real devices or not, is passed separately.
    """

    arch: Architecture
    hardware: HardwareConfig
    """The slice, and the compiler's options."""
    lora: LoraConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    mesh: MeshSizes
    rows: int
    """Rows per microbatch, over all devices."""
    length: int
    """T, in tokens."""
    updates: int
    """Number of updates of the whole run: a constant of the learning-rate schedule."""
    new_tokens: tuple[int, ...] = ()
    """Rows of `model.new_tokens`."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    teacher: TeacherModel | None = None
    """For objectives that have one."""

    @property
    def beside(self) -> Architecture | None:
        """The model that also runs forward in every update: a teacher, or the base as the reference."""
        if self.teacher is not None:
            return self.teacher.arch
        return self.arch if KINDS[self.objective.kind].reference else None

    @property
    def keeps_reference(self) -> bool:
        """Whether the objective's reference needs a copy of the initial trained values, because the base alone does not
        determine it.
        """
        lora = self.lora
        begins_as_base = not (lora.start or takes_part(lora) or lora.modules_to_train or self.new_tokens)
        return KINDS[self.objective.kind].reference and not begins_as_base

    def described(self) -> dict[str, Any]:
        """What must match for a plan and a run to be compared, under the keys of `plan.json`."""
        wanted = slice_of(self.hardware)
        return {
            "slice": self.hardware.name,
            "chips": wanted.chips if wanted else None,
            "model": self.arch.name,
            "trained": trained_as(self.lora, self.arch),
            "objective": self.objective.kind,
            "teacher": self.teacher.arch.name if self.teacher else None,
            "lora_rank": self.lora.rank if self.lora.enabled else None,
            "mesh": self.mesh.record,
            "remat": self.trainer.remat,
            "flags": self.hardware.flags,
            "sequence_length": self.length,
            "rows_per_update": self.rows * self.trainer.microbatches,
            "microbatches": self.trainer.microbatches,
        }


def trained_as(lora: LoraConfig, arch: Architecture) -> str:
    """`lora r=64`, `qlora nf4 r=64` or `full`, and whatever else is not the default: `lora r=64 layers=0-11 +
    norms`.
    """
    if not lora.enabled:
        return "full"
    kind = "dora" if lora.dora else "lora"
    name = f"q{kind} {lora.quantize}" if lora.quantize else kind
    others = [lora.init] if takes_part(lora) else []
    others += [f"experts={expert_rank(arch, lora)}"] if "experts" in lora.targets else []
    others += [f"ranks={lora.ranks}"] if lora.ranks else []
    if lora.targets != LoraConfig().targets:
        others.append(f"targets={','.join(lora.targets)}")
    if lora.layers is not None:
        others.append(f"layers={','.join(lora.layers)}")
    return " + ".join([" ".join([name, f"r={lora.rank}", *others]), *lora.modules_to_train])


def rows_per_update(trainer: TrainerConfig, data: DataConfig) -> int:
    """Rows of T tokens in one update, over all devices."""
    if trainer.global_batch_sequences is not None:
        return trainer.global_batch_sequences
    assert trainer.global_batch_tokens is not None  # the checks ensure that exactly one is set
    return trainer.global_batch_tokens // data.sequence_length


def rows_per_microbatch(trainer: TrainerConfig, data: DataConfig, places: int) -> int:
    """Rows of T tokens in one microbatch, over all devices.

    Raises:
      UserError: the rows do not divide evenly among the `places` of the axes dp and fsdp.
    """
    rows = rows_per_update(trainer, data) // trainer.microbatches
    if rows % places:
        better = trainer.microbatches * places
        raise UserError(
            f"{batch_key(trainer)}: {count(rows, 'row')} per microbatch for mesh.dp × mesh.fsdp = {places}, which "
            f"must divide them; give trainer.global_batch_sequences={better * max(1, round(rows / places))} "
            f"(a multiple of {better}), fewer trainer.microbatches, or a smaller mesh.dp or mesh.fsdp"
        )
    return rows


def check_lengths(lengths: Iterable[int], mesh: MeshSizes) -> None:
    """Refuses (`UserError`) row lengths that cannot be split over the axes cp and tp."""
    parts = mesh.cp * mesh.tp
    odd = [length for length in sorted(set(lengths)) if length % parts]
    if mesh.cp > 1 and odd:
        nearest = max(1, round(odd[-1] / parts)) * parts
        raise UserError(
            f"mesh.cp={mesh.cp}: rows of {', '.join(map(str, odd))} tokens (data.sequence_length, data.buckets) can't"
            f" be split over mesh.cp × mesh.tp = {parts}; give multiples of {parts}, such as {nearest}"
        )


def check_positions(lengths: Iterable[int], arch: Architecture) -> None:
    """Refuses (`UserError`) rows that could hold a longer sequence than the model supports."""
    longest = max(lengths)
    if arch.max_positions is not None and longest > arch.max_positions:
        raise UserError(
            f"data.sequence_length={longest}: the model's longest sequence is {arch.max_positions} tokens"
            " (max_position_embeddings in its config.json); give at most that, and larger updates by"
            " trainer.global_batch_sequences"
        )


def batch_key(trainer: TrainerConfig) -> str:
    """The key that gives the batch, with its value."""
    if trainer.global_batch_sequences is not None:
        return f"trainer.global_batch_sequences={trainer.global_batch_sequences}"
    return f"trainer.global_batch_tokens={trainer.global_batch_tokens}"


def count(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
