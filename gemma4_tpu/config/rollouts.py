"""Types of what on-policy objectives sample and how it is rewarded. Base layer, as `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass

JUDGE = "judge"
"""The reward that runs in a process of the package."""


def is_address(reward: str) -> bool:
    """Whether a reward is a server's address."""
    return reward.lower().startswith(("http://", "https://"))


@dataclass(kw_only=True)
class RolloutsConfig:
    """Rollouts of an on-policy objective and their rewards (`rollouts=`); other objectives do not read them.

    Answers are drawn at temperature 1 from the whole distribution, which is the policy that is trained.
    """

    reward: str | None = None
    """`judge` (Verilog by simulation: passes, has ended, opens with a fence), `module:function` (Python: takes a list
    of rows with `problem`, `prompt`, `completion`, `reference` and `stopped`, returns a number or (number, class) for
    each), or a server's URL, POST `{"samples": [row, …]}` → `{"verdicts": [{"score", "kind"}, …]}`; null: `judge`,
    and for `objective=distill`, which needs none, no reward (a given one is reported, not learned from)."""
    benchmark: str = "verilog_smoke"
    """`reward=judge` only: the benchmark whose problems are the prompts, as `eval.benchmark`. With other rewards the
    prompts come from the rows of `data.train`, up to each one's last answer."""
    problems_path: str | None = None
    """`reward=judge` only: where its problems are, as `eval.problems_path`."""
    reward_timeout_seconds: float = 600.0
    """Timeout for one answer of a reward server."""
    recorded: str | None = None
    """Another run's folder (local), whose stored answers and verdicts are reused as long as prompts and policy (base,
    adapters and dtype) are bit-identical to those that they came from; the rest is drawn and judged. null: everything
    is drawn and judged."""
    prompts: int = 16
    """Groups to train on in each update: those with differing rewards (`grpo`), a reward (`expert_iteration`), or all
    (`distill`)."""
    samples: int = 8
    """Answers drawn for each prompt, which form a group; `grpo` needs 2 or more."""
    resample: float = 2.0
    """Try at most this many times `prompts` prompts per update, to replace groups with nothing to learn from; 1: none
    are replaced."""
    off_policy: int = 0
    """Updates by which answers may be older than the policy that learns from them: answers for this many further
    updates are drawn ahead, so that those of one update are judged while the next ones are drawn; 0: none."""
    prompt_tokens: int = 128
    """Maximum length of a prompt, in tokens; longer prompts are left out and counted."""
    new_tokens: int = 128
    """Answers are cut off at this many tokens."""
    slots: int = 64
    """Sequences in one decoding step."""
    advantages: str = "mean"
    """Rewards minus their group's `mean`, or also divided by its standard deviation (`std`)."""
    mask_truncated: bool = True
    """Do not train on answers that were cut off. Does not apply to `distill`, where the teacher judges each of their
    tokens."""
    overlong_tokens: int = 0
    """Answers that end within this many tokens of `new_tokens` lose part of `overlong_penalty`; 0: none do."""
    overlong_penalty: float = 1.0
    """Penalty on the reward of an answer of `new_tokens` tokens; the earlier an answer ends, the smaller the penalty,
    down to 0."""
    validation_prompts: int = 0
    """Prompts to hold out from training, by a hash of their tokens: the policy answers them before the first update,
    every `validation_every` and after the last, for `validation_reward` and its difference from the start; 0: none."""
    validation_every: int = 20
    """Updates between validations."""
    check_every: int = 10
    """Updates between checks of the sampler against the trainer; the first update is always checked, and so is the
    first one after the adapters have changed. A tracker also receives the answers to the first prompts."""
    max_logprob_difference: float | None = None
    """Mean difference between sampler and trainer, in nats per token, above which the run is refused; null: 0.001 in
    float32, 0.05 in bfloat16."""
    max_kl: float | None = 0.1
    """End the run, keeping the previous checkpoint, after an update that moved the policy by more than this many nats
    per token; null: never."""
    entropy_low: float | None = 0.1
    """Also end the run once the policy's entropy is below this multiple of its initial value; null: never."""
    entropy_high: float | None = 4.0
    """Also end the run once the entropy is above this multiple; null: never."""
    max_malformed: float | None = 0.3
    """Also end the run once the share of malformed answers (`reward=judge`: without an opening fence) is this far above
    its initial value; null: never."""
