"""Builds the objective of a configuration."""

from __future__ import annotations

from gemma4_tpu.config.rollouts import is_address
from gemma4_tpu.config.schema import ObjectiveConfig
from gemma4_tpu.step.distill import Distill, DistillOwn, DistillTop
from gemma4_tpu.step.grpo import ExpertIteration, Grpo
from gemma4_tpu.step.objective import Objective
from gemma4_tpu.step.objective_kinds import KINDS, SFT
from gemma4_tpu.step.preference import Dpo, Ipo, Orpo


def make_objective(config: ObjectiveConfig) -> Objective | None:
    """The objective; None: supervised fine-tuning, which the step does by itself (`Step.objective`)."""
    if config.kind == SFT:
        return None
    if config.kind == "grpo":
        assert config.clip_low is not None and config.clip_high is not None and config.max_drift is not None
        return Grpo(config.clip_low, config.clip_high, config.max_drift)  # the checks ensure that its keys are set
    if config.kind == "expert_iteration":
        return ExpertIteration()
    if (kind := KINDS[config.kind]).taught:
        assert config.divergence is not None
        if is_address(config.teacher or ""):
            assert config.teacher_top is not None
            return DistillTop(config.divergence, config.teacher_top)
        return (DistillOwn if kind.on_policy else Distill)(config.divergence)
    assert config.beta is not None
    if config.kind == "dpo":
        assert config.label_smoothing is not None
        return Dpo(config.beta, config.label_smoothing)
    return {"ipo": Ipo, "orpo": Orpo}[config.kind](config.beta)
