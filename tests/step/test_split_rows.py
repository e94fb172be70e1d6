"""The train step on rows split over `cp`, beside the other axes, against one device."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.config.schema import OptimizerConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.params import random_params
from gemma4_tpu.models.splash import make_attention
from gemma4_tpu.step.optimizer import make_optimizer
from gemma4_tpu.step.train_step import Step
from tests.step.test_train_step import LORA, make_batch, relative_difference, small

ONE = (1, 1, 1, 1)


@cache
def trained_on(kind: str, shape: tuple[int, int, int, int], remat: str = "none"):
    """Three updates on a mesh (dp, fsdp, cp, tp) with dropout: their losses, and the first gradient."""
    dp, fsdp, cp, tp = shape
    mesh = sharding.make_mesh(fsdp, tp, jax.devices()[: dp * fsdp * cp * tp], dp=dp, cp=cp)
    layout = Layout.of(small(kind), replace(LORA, dropout=0.1))
    model = Model(
        layout=layout, compute_dtype=jnp.float32, mesh=mesh, attention=make_attention("auto", mesh), remat=remat,
        lora_dropout=0.1,
    )  # fmt: skip
    # Adam moves a weight by the rate however small its gradient is: see `losses_on` in test_train_step.py.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 10, adapters.trained_leaves(layout))
    step = Step(model, optimizer, chunk_tokens=8)
    base = random_params(small(kind), layout, sharding.places(layout, mesh), jnp.float32, 0)
    init = jax.jit(partial(adapters.init, layout), out_shardings=adapters.shardings(layout, mesh))
    trained = jax.tree.map(
        lambda x: x if x.any() else jax.device_put(np.random.default_rng(x.size).normal(0, 0.05, x.shape), x.sharding),
        init(jax.random.key(1)),
    )
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    state, losses, first = step.init(trained, jax.random.key(0)), [], None

    @jax.jit
    def update(state, base, batch):
        return step.train(state, base, batch), step.gradients(state, base, batch)[1]

    for seed in range(3):
        batch = make_batch(rows=4, seed=seed)
        batch["segment_ids"][..., -3:] = 0  # padding
        batch["target_mask"][..., -3:] = False
        arrays = {k: jax.device_put(v.reshape(2, 2, -1), sharding.batch(mesh)) for k, v in batch.items()}
        (state, metrics), gradient = update(state, base, arrays)
        losses.append(float(metrics.loss))
        first = jax.device_get(gradient) if first is None else first
    return losses, first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape", "remat"),
    [
        ("tiny", (1, 1, 8, 1), "products"),  # a window of 8 takes the tokens of two chips
        ("tiny", (1, 2, 2, 2), "decoder"),
        ("tiny_moe", (2, 1, 2, 2), "attention"),
        ("tiny_e2b", (1, 1, 4, 2), "products"),
    ],
)
def test_updates_on_split_rows_are_those_on_one_device(kind, shape, remat):
    """Packed rows with padding, targets in some places only, two microbatches, adapters with dropout."""
    losses, gradient = trained_on(kind, shape, remat)
    wanted, of_one = trained_on(kind, ONE)
    np.testing.assert_allclose(losses, wanted, atol=1e-5)
    assert relative_difference(gradient, of_one) < 2e-5  # the same sums in fp32, added up in another order
