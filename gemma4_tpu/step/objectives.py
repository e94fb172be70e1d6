"""The objective that a configuration asks for."""

from __future__ import annotations

from gemma4_tpu.config.schema import ObjectiveConfig
from gemma4_tpu.step.grpo import ExpertIteration, Grpo
from gemma4_tpu.step.objective import Objective
from gemma4_tpu.step.preference import Dpo


def make_objective(config: ObjectiveConfig) -> Objective | None:
    """None: supervised tuning, which is the step's own (`Step.objective`)."""
    if config.kind == "dpo":
        assert config.beta is not None and config.label_smoothing is not None  # the checks: its keys are set
        return Dpo(config.beta, config.label_smoothing)
    if config.kind == "grpo":
        assert config.clip_low is not None and config.clip_high is not None and config.max_drift is not None
        return Grpo(config.clip_low, config.clip_high, config.max_drift)
    return ExpertIteration() if config.kind == "expert_iteration" else None
