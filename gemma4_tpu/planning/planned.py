"""A configuration to plan, and the result of packing its data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from gemma4_tpu.config.tasks import PlanRoot
from gemma4_tpu.planning.checks import PlanChecked, recipe_of
from gemma4_tpu.planning.fill import Fill, Lengths, fill_of, lengths_of
from gemma4_tpu.step.objective_kinds import rows_of
from gemma4_tpu.training.recipe import Recipe


@dataclass(frozen=True)
class Planned:
    """A configuration that passed the checks, and the result of packing its data."""

    config: PlanRoot
    checked: PlanChecked
    lengths: Lengths
    fill: Fill

    @staticmethod
    def of(config: PlanRoot, checked: PlanChecked, like: Planned | None = None) -> Planned:
        """`like`: a plan whose lengths can be reused if it has the same data."""
        if like is not None and (like.config.data, like.config.objective) == (config.data, config.objective):
            lengths = like.lengths
        else:
            rows_are = rows_of(config.objective)
            lengths = lengths_of(config.model, config.data, config.plan, rows_are, data_here=checked.data_here)
        return Planned(config, checked, lengths, fill_of(lengths, config.data, config.trainer))

    @cached_property
    def recipe(self) -> Recipe:
        """The step that is compiled."""
        return recipe_of(self.config, self.checked)
