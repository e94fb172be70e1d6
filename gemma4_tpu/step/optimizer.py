"""AdamW with a warm-up and a decay, built from the configuration."""

from __future__ import annotations

import optax

from gemma4_tpu.config.schema import OptimizerConfig


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate of update u = 0, 1, … for a run of `total_updates`.

    Warm-up rises linearly from 0; update 0 with a warm-up therefore changes nothing. After it, `cosine` and `linear`
    reach `end_fraction · learning_rate` at the last update.
    """
    warmup = config.warmup_updates
    rest = max(total_updates - 1 - warmup, 1)
    end = config.learning_rate * config.end_fraction
    after = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "linear": lambda: optax.linear_schedule(config.learning_rate, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.end_fraction),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Clip by global norm (if configured), then AdamW. State has the dtype of the trained values (float32)."""
    adamw = optax.adamw(
        make_schedule(config, total_updates), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    )
    if config.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
