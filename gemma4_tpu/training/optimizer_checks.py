"""Checks of `optimizer=`, of averages of the trained values, and of early stopping. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping

from gemma4_tpu.config.schema import ObjectiveConfig, OptimizerConfig, TrainerConfig

KEYS = {
    "adamw": ("b1", "b2", "eps"),
    "adafactor": ("eps", "decay_rate", "clipping_threshold", "multiply_by_parameter_scale"),
    "lion": ("b1", "b2"),
    "muon": ("b1", "b2", "eps", "beta", "ns_steps", "consistent_rms"),
    "schedule_free": ("b1", "b2", "eps"),
}
"""Keys of each kind besides the schedule's keys, `weight_decay` and `max_grad_norm`, which all kinds have."""
MAY_BE_NULL = ("clipping_threshold", "consistent_rms")
SCHEDULE_FREE = "schedule_free"
STATE_VALUES = {"adamw": 2, "adafactor": 0, "lion": 1, "muon": 1, "schedule_free": 2}
"""Minimal number of float32 values that a kind keeps per trained value."""


def trained_bytes(optimizer: OptimizerConfig, trainer: TrainerConfig) -> int:
    """Bytes per trained value: itself, its gradient, the optimizer state and the average, in float32."""
    return 4 * (2 + STATE_VALUES.get(optimizer.kind, 0) + (trainer.ema_decay is not None))


def optimizer_problems(optimizer: OptimizerConfig, trainer: TrainerConfig) -> list[str]:
    """Keys that a kind lacks or needs; an incompatible schedule or average; two warm-ups."""
    if optimizer.kind not in KEYS:  # reported as an invalid choice
        return []
    messages = kind_problems("optimizer", optimizer, KEYS, MAY_BE_NULL)
    if optimizer.kind == SCHEDULE_FREE:
        messages += _schedule_free(optimizer, trainer)
    if optimizer.decay_fraction is not None and optimizer.schedule != "wsd":
        messages.append(
            f"optimizer.decay_fraction={optimizer.decay_fraction}: optimizer.schedule={optimizer.schedule} has none; "
            "give optimizer.schedule=wsd, or optimizer.decay_fraction=null"
        )
    updates, fraction = optimizer.warmup_updates, optimizer.warmup_fraction
    if updates is not None and fraction is not None:
        messages.append(
            f"optimizer.warmup_updates={updates}, optimizer.warmup_fraction={fraction}: give one of them; add "
            "optimizer.warmup_fraction=null or optimizer.warmup_updates=null"
        )
    return messages


def undecayed(optimizer: OptimizerConfig) -> list[str]:
    """A warning about the end of a schedule that has none; an experiment can have set it, so it is not refused."""
    if optimizer.schedule != "constant" or not optimizer.end_fraction:
        return []
    return [f"no effect of optimizer.end_fraction={optimizer.end_fraction}: optimizer.schedule=constant does not decay"]


def kind_problems(
    group: str, config: OptimizerConfig | ObjectiveConfig, keys: Mapping[str, tuple[str, ...]],
    may_be_null: tuple[str, ...] = (),
) -> list[str]:  # fmt: skip
    """Keys of a config group that its kind lacks or needs; `keys` lists those of each kind."""
    own, kind = keys[config.kind], f"{group}={config.kind}"
    every = dict.fromkeys(name for names in keys.values() for name in names)
    given = {name: value for name in every if (value := getattr(config, name)) is not None}
    messages = []
    if alien := [f"{group}.{name}={value}" for name, value in given.items() if name not in own]:
        known = ", ".join(f"{group}.{name}" for name in own)
        its = f"which sets its own keys ({known})" if own else "which has no keys"
        messages.append(f"{', '.join(alien)}: not with {kind}; give null, or {kind}, {its}")
    if missing := [f"{group}.{name}=null" for name in own if name not in (*given, *may_be_null)]:
        messages.append(f"{', '.join(missing)}: {kind} needs a value; {kind} on the command line sets one")
    return messages


def _schedule_free(optimizer: OptimizerConfig, trainer: TrainerConfig) -> list[str]:
    messages = []
    if optimizer.schedule != "constant":
        messages.append(
            f"optimizer.schedule={optimizer.schedule}: optimizer={SCHEDULE_FREE} averages instead of decaying; give "
            "optimizer.schedule=constant (after the warm-up), or another optimizer"
        )
    if trainer.ema_decay is not None:
        messages.append(
            f"trainer.ema_decay={trainer.ema_decay}: optimizer={SCHEDULE_FREE} keeps its own average; give "
            "trainer.ema_decay=null, or another optimizer"
        )
    if optimizer.b1 == 0:
        messages.append(f"optimizer.b1=0: optimizer={SCHEDULE_FREE} needs more than 0, such as 0.9")
    return messages


def stop_problems(trainer: TrainerConfig) -> list[str]:
    """`trainer.patience` without evaluations to count, and `trainer.min_delta` without it."""
    if trainer.patience is None and trainer.min_delta:
        return [f"trainer.min_delta={trainer.min_delta}: only with trainer.patience=<evaluations>; give 0"]
    if trainer.patience is not None and not trainer.eval_every:
        return [
            f"trainer.patience={trainer.patience}: counts held-out evaluations, but trainer.eval_every=0 makes none "
            "before the last update; give trainer.eval_every=<updates>"
        ]
    return []
