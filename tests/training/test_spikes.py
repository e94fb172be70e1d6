"""Updates whose loss is a spike change nothing, and a resumed run skips the very same ones."""

import math

import jax
import numpy as np
import pytest

from gemma4_tpu.training.spikes import WARMUP_UPDATES, Spikes
from tests.step.test_train_step import make, make_batch, started


def limits(losses, *, read_at=(), start=None):
    """(limit of each update, updates skipped) of a loop that reads a loss one update late, except at `read_at`."""
    spikes, given, skipped, pending = start or Spikes(2.0), [], [], None
    for update, loss in enumerate(losses, start=spikes.newest_at + 1):
        limit = spikes.limit(update)
        given.append(float(limit))
        if pending:
            spikes.add(*pending)
        if loss > limit:
            skipped.append(update)
        pending = (update, loss, limit)
        if update in read_at:
            spikes.add(*pending)
            pending = None
    return given, skipped, spikes


def test_a_spike_is_skipped_once_enough_losses_are_known_and_does_not_move_the_median():
    losses = [3.0] * 30
    losses[4] = losses[20] = losses[25] = 9.0
    given, skipped, spikes = limits(losses)
    assert skipped == [21, 26]  # the one at update 5 came too early
    assert all(math.isinf(limit) for limit in given[: WARMUP_UPDATES + 1])
    assert set(given[WARMUP_UPDATES + 1 :]) == {6.0}
    assert spikes.losses.count(9.0) == 1


def test_when_losses_are_read_does_not_change_the_limits():
    losses = list(3 + np.random.default_rng(0).random(200))
    assert limits(losses)[0] == limits(losses, read_at=range(1, 201))[0] == limits(losses, read_at={37, 90, 91})[0]


@pytest.mark.parametrize("at", [5, 17, 64, 150])
def test_a_resumed_run_has_the_same_limits(at):
    losses = list(3 + np.random.default_rng(1).random(200))
    whole, _, _ = limits(losses)
    before, _, spikes = limits(losses[:at], read_at={at})
    saved = Spikes(2.0, losses=list(spikes.losses), newest_at=spikes.newest_at)
    after, _, _ = limits(losses[at:], start=saved)
    assert before + after == whole


def test_on_the_devices_a_skipped_update_changes_the_counters_only():
    step, base, trained = make()
    state = started(step, trained)
    batch = {name: jax.numpy.asarray(array) for name, array in make_batch(4).items()}
    train = jax.jit(step.train)
    warm, metrics = train(state, base, batch)
    loss = float(metrics.loss)
    plain, _ = train(warm, base, batch)
    taken, _ = train(warm, base, batch, np.float32(loss * 2))
    skipped, seen = train(warm, base, batch, np.float32(0.5))
    assert float(seen.loss) > 0.5 and int(skipped.update) == 2
    for x, y in zip(jax.tree.leaves(taken), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(jax.random.key_data(x) if x.dtype == plain.key.dtype else x,
                                      jax.random.key_data(y) if x.dtype == plain.key.dtype else y)  # fmt: skip
    for x, y in zip(jax.tree.leaves(skipped.trained), jax.tree.leaves(warm.trained), strict=True):
        np.testing.assert_array_equal(x, y)
    counts = [x for x in jax.tree.leaves(skipped.optimizer) if x.ndim == 0]
    assert counts and all(int(x) == 2 for x in counts)
    moments = zip(jax.tree.leaves(skipped.optimizer), jax.tree.leaves(warm.optimizer), strict=True)
    assert all(np.array_equal(x, y) for x, y in moments if x.ndim)
