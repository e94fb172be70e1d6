"""Optax's optimizers with warm-up and decay, built from the configuration, and averages of the trained values.

Trained arrays are stacks of layers, some of them of several products (K and V, experts). Whatever an optimizer does to
a matrix as a whole must be done to each of them separately: Muon's orthogonalisation, Adafactor's rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, ScheduleFreeState

from gemma4_tpu.config.schema import OptimizerConfig
from gemma4_tpu.models.layout import Leaf, build_tree
from gemma4_tpu.step.warmup import warmup_updates

DECAY_FRACTION = 0.1
"""Default of a `wsd` schedule."""


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate of update u = 0, 1, … for a run of `total_updates`.

    Warm-up rises linearly from 0, so update 0 of a run with warm-up changes nothing. Afterwards, `cosine` and `linear`
    reach `end_fraction · learning_rate` at the last update; `wsd` stays at the peak until its last `decay_fraction`.
    """
    warmup = warmup_updates(config, total_updates)
    peak, last = config.learning_rate, total_updates - 1
    rest = max(last - warmup, 1)
    end = peak * config.end_fraction
    decay = min(max(round((config.decay_fraction or DECAY_FRACTION) * total_updates), 1), rest)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.end_fraction),
        "wsd": lambda: optax.linear_schedule(peak, end, decay, transition_begin=rest - decay),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: OptimizerConfig, total_updates: int, leaves: Iterable[Leaf]
) -> optax.GradientTransformationExtraArgs | optax.GradientTransformation:
    """Clips by global norm (if configured), then applies the optimizer. State has the dtype of the trained values
    (float32).

    Args:
      config: the optimizer and its settings.
      total_updates: of the run.
      leaves: what it trains.
    """
    rate, trained = make_schedule(config, total_updates), list(leaves)
    chosen = {
        "adamw": lambda: optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay),
        "adafactor": lambda: _adafactor(config, rate, trained),
        "lion": lambda: optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay),
        "muon": lambda: _muon(config, rate, trained),
        "schedule_free": lambda: optax.contrib.schedule_free_adamw(
            config.learning_rate, warmup_updates(config, total_updates) or None, config.b1, config.b2, config.eps,
            config.weight_decay,
        ),
    }[config.kind]()  # fmt: skip
    if config.max_grad_norm is None:
        return chosen
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), chosen)


def _muon(config: OptimizerConfig, rate: optax.Schedule, leaves: list[Leaf]) -> optax.GradientTransformation:
    """Treats each product of each layer as a matrix [inputs, outputs], whatever the dims of its array; Adam takes the
    rest.
    """

    def numbers(leaf: Leaf) -> MuonDimensionNumbers | None:
        ends = leaf.matrix
        return ends and MuonDimensionNumbers(*ends)

    return optax.contrib.muon(
        rate,
        ns_steps=config.ns_steps,
        beta=config.beta,
        eps=config.eps,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=build_tree((leaf.path, numbers(leaf)) for leaf in leaves),
        consistent_rms=config.consistent_rms,
    )


def _adafactor(config: OptimizerConfig, rate: optax.Schedule, leaves: list[Leaf]) -> optax.GradientTransformation:
    """Treats each layer (and expert) separately: rows and columns, the clipping of a step, and the size of the values.

    Optax does not multiply Adafactor's weight decay by the learning rate; here it is, as in every other optimizer.
    """
    decay = config.weight_decay
    one = optax.adafactor(
        rate,
        decay_rate=config.decay_rate,
        multiply_by_parameter_scale=config.multiply_by_parameter_scale,
        clipping_threshold=config.clipping_threshold,
        weight_decay_rate=(lambda count: decay * rate(count)) if decay else None,
        eps=config.eps,
    )
    # Dims that count layers, and experts within them, come first in an array.
    depth = build_tree((leaf.path, leaf.stacked + sum(d in leaf.weight.each for d in leaf.dims)) for leaf in leaves)

    def init(params: Any) -> Any:
        return jax.tree.map(lambda x, n: _each(one.init, n)(x), params, depth)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        made = jax.tree.map(lambda g, s, p, n: _each(one.update, n)(g, s, p), grads, state, params, depth)
        changes, states = (jax.tree.map(lambda _, pair, i=i: pair[i], grads, made) for i in (0, 1))
        return changes, states

    return optax.GradientTransformation(init, update)


def _each(function: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Maps `function` over the first `depth` dims of its arguments; scalars (counters) are shared."""
    if not depth:
        return function
    inner = _each(function, depth - 1)

    def mapped(*given: Any) -> Any:
        items = jax.tree.map(lambda x: x[0] if x.ndim else x, given)
        made = jax.eval_shape(inner, *items)
        return jax.vmap(inner, *(jax.tree.map(lambda x: 0 if x.ndim else None, one) for one in (given, made)))(*given)

    return mapped


def next_average(average: Any, trained: Any, decay: float, update: jax.Array) -> Any:
    """The exponential average after `update` (1, 2, …), which produced these trained values.

    Weights are decay^age over their sum, so that the initial values have no weight: after 300 updates, a plain average
    of 0.999 would still be three quarters initial values.
    """
    log_decay = jnp.log(jnp.float32(decay))
    share = jnp.minimum(jnp.expm1(log_decay) / jnp.expm1(log_decay * update), 1.0)  # (1 - decay) / (1 - decay^update)
    return optax.incremental_update(trained, average, share)


def schedule_free_average(optimizer: Any, trained: Any) -> Any | None:
    """The average that a schedule-free optimizer evaluates with, from its state; None for other optimizers."""

    def is_it(node: Any) -> bool:
        return isinstance(node, ScheduleFreeState)

    for node in filter(is_it, jax.tree.leaves(optimizer, is_leaf=is_it)):
        return optax.contrib.schedule_free_eval_params(node, trained)
    return None
