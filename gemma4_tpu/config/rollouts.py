"""Types of what on-policy objectives sample and how it is rewarded. Ground: `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class RolloutsConfig:
    """Roll-outs of an on-policy objective and their rewards (`rollouts=`); other objectives do not read them.

    Answers are drawn at temperature 1 from the whole distribution: that is the policy that is trained.
    """

    reward: str = "judge"
    """`judge` (Verilog by simulation: passes, has ended, opens with a fence), `module:function` (Python: takes a
    list of rows with `problem`, `prompt`, `completion`, `reference` and `stopped`, gives a number or (number, class)
    for each), or a server's URL, POST `{"samples": [row, …]}` → `{"verdicts": [{"score", "kind"}, …]}`."""
    benchmark: str = "verilog_smoke"
    """`reward=judge` only: the benchmark whose problems are the prompts, as `eval.benchmark`. With other rewards the
    prompts are those of the rows of `data.train`, up to each one's last answer."""
    problems_path: str | None = None
    """`reward=judge` only: where its problems lie, as `eval.problems_path`."""
    reward_timeout_seconds: float = 600.0
    """For one answer of such a server."""
    prompts: int = 16
    """Groups to train on in an update, whose rewards differ."""
    samples: int = 8
    """Answers drawn for each prompt: a group."""
    resample: float = 2.0
    """Ask at most so many times `prompts` in an update to replace groups without anything to learn from; 1: none are
    replaced."""
    prompt_tokens: int = 128
    """Room for a prompt, in tokens; prompts that are longer are left out and counted."""
    new_tokens: int = 128
    """Answers are cut off here, in tokens."""
    slots: int = 64
    """Sequences in one decoding step."""
    advantages: str = "mean"
    """Rewards less their group's `mean`, or also over its standard deviation (`std`)."""
    mask_truncated: bool = True
    """Do not train on answers that were cut off."""
    overlong_tokens: int = 0
    """Answers that end within so many tokens of `new_tokens` lose a part of `overlong_penalty`; 0: none do."""
    overlong_penalty: float = 1.0
    """What an answer of `new_tokens` tokens loses of its reward; less, the earlier it ends, down to nothing."""
    check_every: int = 10
    """Updates between checks of the sampler against the trainer; the first one is always checked, and the first
    one after the adapters have changed."""
    max_logprob_difference: float | None = None
    """Mean difference of the two in nats per token at which the run is refused; null: 0.001 in float32, 0.05 in
    bfloat16."""
    max_kl: float | None = 0.1
    """End the run, and keep the checkpoint before, after an update that moved the policy by more than so many nats per
    token; null: never."""
    entropy_low: float | None = 0.1
    """The same once the policy's entropy is below this multiple of what it was at first; null: never."""
    entropy_high: float | None = 4.0
    """The same above this multiple; null: never."""
    max_malformed: float | None = 0.3
    """The same once the share of malformed answers (`reward=judge`: they do not open with a fence) is this far above
    what it was at first; null: never."""
