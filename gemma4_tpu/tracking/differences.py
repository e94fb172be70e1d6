"""Differences between two configurations, and which of them a resumed run may have."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from gemma4_tpu.config.refusals import resume_allow
from gemma4_tpu.errors import UserError

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "checkpoint", "distributed", "hardware", "lora.start", "lora.start_checkpoint", "mesh", "name", "preview", "replay",
    "replay_allow", "rollouts.check_every", "rollouts.entropy_high", "rollouts.entropy_low", "rollouts.max_kl",
    "rollouts.max_logprob_difference", "rollouts.max_malformed", "rollouts.reward_timeout_seconds",
    "run_dir", "storage", "tracker", "trainer.attention", "trainer.compile_cache", "trainer.epochs",
    "trainer.eval_every", "trainer.log_every", "trainer.loss_chunk_tokens", "trainer.max_updates", "trainer.min_delta",
    "trainer.patience", "trainer.plan", "trainer.profile", "trainer.remat", "trainer.sample_prompts",
    "trainer.sample_tokens", "trainer.stall_seconds", "trainer.time_limit",
)  # fmt: skip
"""Keys and groups that a resumed run may change; changing any other would make it a different run."""


def check_same_run(
    address: str, resume: str, recorded: dict[str, Any], given: dict[str, Any], allow: Sequence[str]
) -> None:
    """Refuses to resume a run with a configuration that would make it a different run.

    Args:
      address: of its folder.
      resume: `config.checkpoint.resume`.
      recorded: the configuration in the folder.
      given: the one of this start.
      allow: keys and groups that may differ besides `MAY_CHANGE`.

    Raises:
      UserError: `resume` is `never`, or another key differs.
    """
    if resume == "never":
        raise UserError(
            f"checkpoint.resume=never: {address} already holds a run; "
            "give another run_dir, or checkpoint.resume=auto to continue it"
        )
    forbidden: dict[str, str] = {}
    for key, before, now in config_differences(recorded, given):
        if is_among(key, MAY_CHANGE) or is_among(key, allow):
            log.info("resuming with %s=%s (was %s)", key, now, before)
        else:
            forbidden[key] = f"\n  {key}: {now} (the run has {before})"
    if forbidden:
        raise UserError(
            f"run_dir={address} holds a run with another configuration:{''.join(forbidden.values())}\n"
            "give the run's values to resume it, another run_dir to start afresh, or accept the differences: "
            f"{resume_allow(allow, forbidden)}"
        )


def config_differences(recorded: dict[str, Any], given: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, recorded value, given value) where two configurations differ.

    Keys that only one of them has (it comes from another version) are left out.
    """
    before, now = dict(leaves(recorded)), dict(leaves(given))
    return ((key, before[key], value) for key, value in now.items() if key in before and before[key] != value)


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a configuration; a mapping without a key is a value."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_among(key: str, allowed: Sequence[str]) -> bool:
    """Whether a key or a group that holds it is named."""
    return any(key == name or key.startswith(name + ".") for name in allowed)
