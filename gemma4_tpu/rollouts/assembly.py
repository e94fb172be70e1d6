"""Builds a source of on-policy updates from a configuration: first what needs no weights, then what does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from gemma4_tpu.config.rollouts import RolloutsConfig
from gemma4_tpu.config.schema import DataConfig, TrainerConfig
from gemma4_tpu.data.examples import Examples
from gemma4_tpu.evals.generate import padded_width
from gemma4_tpu.rollouts.batch import BatchShape
from gemma4_tpu.rollouts.certificate import Certificate
from gemma4_tpu.rollouts.collecting import Collector
from gemma4_tpu.rollouts.on_policy_run import OnPolicyRun
from gemma4_tpu.rollouts.policy_tasks import asked
from gemma4_tpu.rollouts.rewarding import Reward, open_reward
from gemma4_tpu.rollouts.sampler import Sampler, SamplerShapes
from gemma4_tpu.rollouts.scoring import Scorer
from gemma4_tpu.rollouts.selection import Selection, by_advantage, by_reward, every_answer
from gemma4_tpu.rollouts.source import Making, OnPolicySource, Show
from gemma4_tpu.rollouts.validation import Validation
from gemma4_tpu.step.grpo import Grpo
from gemma4_tpu.step.train_step import Step

SELECTIONS: dict[str, Callable[[RolloutsConfig], Selection]] = {
    "grpo": lambda config: by_advantage(config, Grpo.fields),
    "expert_iteration": by_reward,
    "distill": lambda config: every_answer(),
}
"""Kind of objective → the answers it learns from."""


def make_source(
    kind: str, config: RolloutsConfig, trainer: TrainerConfig, data: DataConfig, rows: int, train: Examples,
    tokenizer: Any, own: tuple[int, int] | None = None,
) -> OnPolicySource:  # fmt: skip
    """The source of a run's updates, before weights are loaded.

    Args:
      kind: of the objective.
      config: what to sample, and how to reward it.
      trainer: length of the run and microbatches.
      data: length of the rows; thoughts.
      rows: rows per microbatch.
      train: the training rows, whose prompts are used if the reward brings no problems.
      tokenizer: the checkpoint's own.
      own: (start, stop) of the rows of a microbatch that this process owns; None: all.

    Raises:
      UserError: there are no prompts, or too few.
    """
    shape = BatchShape(trainer.microbatches, rows, data.sequence_length)
    trained_on, validated_on = asked(config, data, train, tokenizer)
    return OnPolicySource(trained_on, config, trainer, shape, SELECTIONS[kind](config), validated_on, own)


def begin(
    source: OnPolicySource, run: OnPolicyRun, step: Step, base: Any, tokenizer: Any, stop_ids: Sequence[int], *,
    report: Callable[[dict[str, Any], int], None], show: Show,
) -> None:  # fmt: skip
    """Makes a source ready: starts the reward, and creates sampler and certificate.

    Args:
      source: from `make_source`.
      run: what to draw, and for which run.
      step: the trainer's own.
      base: the frozen weights.
      tokenizer: the checkpoint's own.
      stop_ids: tokens that end an answer.
      report: receives metrics of an update.
      show: receives answers, as tables for a tracker.

    Raises:
      UserError: the reward does not start.
    """
    config = run.config
    width = padded_width([range(config.prompt_tokens)])  # a width that attention's kernel accepts
    shapes = SamplerShapes(config.slots, config.prompts, width, config.new_tokens)
    with ExitStack() as opened:
        rewards: list[Reward | None] = []
        run.hosts.from_first(lambda: rewards.append(opened.enter_context(open_reward(config))))
        certificate = Certificate(run, step.model.compute_dtype)
        opened.callback(certificate.close)
        reward = rewards[0] if rewards else None
        collector = Collector(Sampler(step, stop_ids, shapes), reward, tokenizer, source.selection.is_live, run)
        validation = Validation(source.validated_on, source.total_updates, run)
        opened.callback(validation.close)
        making = Making(collector, Scorer(step), certificate, validation, base, report, show, opened.pop_all())
        source.begin(making)
