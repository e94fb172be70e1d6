"""What an objective may rely on: the step's likelihoods, one denominator over all microbatches, sums that add up."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma4_tpu.step.objective import REFERENCE, REFERENCE_NLL, Mean, Objective, means
from tests.step.test_train_step import gradients, make, make_batch, regroup, relative_difference


@dataclass(frozen=True)
class Tuning(Objective):
    """Supervised tuning, written as an objective."""

    def loss(self, nll, rows):
        mask = rows["target_mask"]
        return jnp.where(mask, nll, 0.0).sum(), {
            "likely": Mean((mask & (nll < 6)).sum().astype(jnp.float32), mask.sum())
        }

    def denominator(self, batch):
        return batch["target_mask"].sum()


@dataclass(frozen=True)
class Weighted(Tuning):
    """Tokens count by weights of their own, which the batch brings along, and are held against the reference."""

    fields: ClassVar = {"weights": jnp.float32}
    reference: ClassVar = True

    def loss(self, nll, rows):
        away = jnp.where(rows["target_mask"], rows[REFERENCE_NLL] - nll, 0.0)
        return (rows["weights"] * away**2).sum(), {"away": Mean(away.sum(), rows["weights"].sum())}

    def denominator(self, batch):
        return batch["weights"].sum()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.slow
def test_supervised_tuning_as_an_objective_has_the_gradients_of_the_step_itself(full):
    step, base, trained = make(full=full)
    own = replace(step, objective=Tuning())
    (loss, grads, count, none), (same, same_grads, same_count, stats) = (
        gradients(one, base, trained, make_batch(4)) for one in (step, own)
    )
    np.testing.assert_allclose(same, loss, rtol=1e-6)  # some 60 float32 values in another order
    # The same products, but scaled by the token's weight behind the vocabulary instead of before it.
    apart = optax.global_norm(jax.tree.map(jnp.subtract, same_grads, grads))
    assert apart < 1e-5 * optax.global_norm(grads)
    assert count == same_count and none == {}
    assert 0 < means(stats)["likely"] < 1


@pytest.mark.slow
def test_microbatches_of_uneven_weight_equal_the_whole():
    step, base, trained = make()
    step = replace(step, objective=Weighted())
    batch = make_batch(4)
    batch["weights"] = np.random.default_rng(5).exponential(size=batch["tokens"].shape).astype(np.float32)
    batch["weights"][:, 3] = 0.0
    (loss, grads, _, stats), (again, again_grads, _, again_stats) = (
        gradients(step, base, trained, regroup(batch, microbatches)) for microbatches in (1, 4)
    )
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    assert relative_difference(again_grads, grads) < 2e-5
    np.testing.assert_allclose(means(again_stats)["away"], means(stats)["away"], rtol=1e-4)
    total, count, held = jax.jit(step.evaluate)(trained, base, regroup(batch, 4))
    np.testing.assert_allclose(total / count, loss, rtol=1e-5)
    np.testing.assert_allclose(held["away"], again_stats["away"], rtol=1e-4)


@pytest.mark.slow
def test_the_reference_is_the_base_alone_or_what_is_said_to_be_it():
    step, base, trained = make()
    step = replace(step, objective=Weighted())
    batch = make_batch(2)
    batch["weights"] = np.ones(batch["tokens"].shape, np.float32)
    rows = {name: value[0] for name, value in batch.items()}

    def loss(values, frozen):
        return float(jax.jit(step.summed_loss)(values, frozen, rows, None)[0])

    without = jax.tree.map(jnp.zeros_like, trained)  # B = 0 adds nothing
    assert loss(without, base) == pytest.approx(0.0, abs=1e-6) and loss(trained, base) > 1e-3
    assert loss(trained, base | {REFERENCE: trained}) == pytest.approx(0.0, abs=1e-6)
    assert loss(without, base | {REFERENCE: trained}) == pytest.approx(loss(trained, base), rel=1e-4)


def test_a_figure_without_anything_to_count_is_left_out():
    assert means({"some": (3.0, 2), "none": (0.0, 0)}) == {"some": 1.5}
