"""The teacher of a distillation: any model of this project with the student's vocabulary."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from gemma4_tpu.config.schema import ObjectiveConfig
from gemma4_tpu.data.tokenizer import tokenizer_fingerprint
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.any_model import AnyModel, find_model
from gemma4_tpu.models.base import Base
from gemma4_tpu.training.recipe import TeacherModel

log = logging.getLogger(__name__)

SHOWN = 3
"""Number of differing tokens that a refusal names."""


@dataclass(frozen=True)
class Teacher:
    """A teacher, checked against the student but not loaded."""

    found: AnyModel

    @property
    def model(self) -> TeacherModel:
        """What the step needs to know about it."""
        return TeacherModel(self.found.base.arch, self.found.lora)

    def weights(self, mesh: Mesh, compute_dtype: str) -> dict[str, Any]:
        """The teacher's weights as the step takes them, next to the frozen weights (`step.objective.TEACHER`)."""
        loaded = self.found.load(mesh, compute_dtype)
        return {"params": loaded.params} | ({} if loaded.lora is None else {"lora": loaded.lora})


def open_teacher(objective: ObjectiveConfig, student: Base, tokenizer: Any) -> Teacher:
    """Finds `objective.teacher`, and compares its vocabulary with the student's.

    Raises:
      UserError: nothing loadable is there, or the vocabulary differs; names differing tokens.
    """
    given = f"objective.teacher={objective.teacher}"
    try:
        found = find_model(
            str(objective.teacher), checkpoint=str(objective.teacher_checkpoint), model=objective.teacher_model
        )
    except UserError as error:
        raise UserError(f"{given}: {error}") from None
    if problem := _another_vocabulary(student, tokenizer, found):
        raise UserError(
            f"{given}: {problem}; a teacher scores the student's own tokens, so it needs the same vocabulary"
        )
    own, its = (tokenizer_fingerprint(one)["chat_template"] for one in (tokenizer, found.tokenizer))
    if own != its:
        log.warning("%s: its chat template differs; it will read text rendered by the student's template", given)
    log.info("teacher: %s, %s", found.base.arch.name, objective.teacher)
    return Teacher(found)


def _another_vocabulary(student: Base, tokenizer: Any, teacher: AnyModel) -> str | None:
    """How the vocabularies differ, token by token; None: not at all."""
    rows = student.arch.vocab_size, teacher.base.arch.vocab_size
    if rows[0] != rows[1]:
        return f"its output has {rows[1]:,} tokens, the student's {rows[0]:,}"
    own, its = ({place: token for token, place in one.get_vocab().items()} for one in (tokenizer, teacher.tokenizer))
    differing = sorted(place for place in own.keys() | its.keys() if own.get(place) != its.get(place))
    if not differing:
        return None
    named = ", ".join(f"{place} is {its.get(place)!r}, here {own.get(place)!r}" for place in differing[:SHOWN])
    more = f" and {len(differing) - SHOWN:,} more" if len(differing) > SHOWN else ""
    return f"{len(differing):,} of its tokens differ: {named}{more}"
