"""Length of the learning rate's warm-up. Imports no JAX, because the checks use it."""

from __future__ import annotations

from gemma4_tpu.config.schema import OptimizerConfig


def warmup_updates(config: OptimizerConfig, total_updates: int) -> int:
    """Updates of warm-up in a run of `total_updates`."""
    if config.warmup_fraction is not None:
        return round(config.warmup_fraction * total_updates)
    return config.warmup_updates or 0
