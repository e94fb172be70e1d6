"""The train step on rows split over `cp`, beside the other axes, against one device."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from gemma4_tpu.models import sharding
from tests.step.test_train_step import LORA, make, make_batch, relative_difference, started


def two_updates(kind: str, **settings):
    """Losses of two updates, and Adam's first moments after the first: its gradient, times a constant."""
    lora = replace(LORA, dropout=settings.get("lora_dropout", 0.0))
    # Adam moves a weight by the rate however small its gradient is: see `losses_on` in test_train_step.py.
    step, base, trained = make(kind, lora=lora, rate=1e-3, **settings)
    place, update = sharding.batch(step.model.mesh), jax.jit(step.train)
    state, losses, moments = started(step, trained), [], []
    for seed in range(2):
        batch = make_batch(rows=2, seed=seed)
        batch["segment_ids"][..., -3:] = 0  # padding
        batch["target_mask"][..., -3:] = False
        state, metrics = update(state, base, {name: jax.device_put(x, place) for name, x in batch.items()})
        losses.append(float(metrics.loss))
        moments.append(jax.device_get(optax.tree_utils.tree_get(state.optimizer, "mu")))
    return losses, moments[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mesh", "settings"),
    [
        ("tiny", {"cp": 8}, {"lora_dropout": 0.1, "remat": "products"}),  # a window of 8 takes two chips' tokens
        ("tiny_moe", {"dp": 2, "cp": 2, "tp": 2}, {"remat": "decoder"}),
        ("tiny_e2b", {"fsdp": 2, "cp": 2, "tp": 2}, {"remat": "attention"}),
    ],
)
def test_updates_on_split_rows_are_those_on_one_device(kind, mesh, settings):
    """Packed rows with padding, targets in some places only; K = V, experts, KV-shared layers, dropout."""
    losses, gradient = two_updates(kind, **mesh, **settings)
    wanted, of_one = two_updates(kind, lora_dropout=settings.get("lora_dropout", 0.0))
    np.testing.assert_allclose(losses, wanted, atol=1e-5)
    assert relative_difference(gradient, of_one) < 2e-5  # the same sums in fp32, added up in another order
