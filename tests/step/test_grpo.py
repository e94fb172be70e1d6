"""The clipped policy gradient against its formula, one token and one sequence at a time."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.step.grpo import ADVANTAGES, COPIES, OLD_LOGPROBS, ExpertIteration, Grpo
from gemma4_tpu.step.objective import means
from tests.step.test_train_step import make

LOW, HIGH = 0.2, 0.28


def rows(old, gain, *, copies=1.0, mask=True, segments=1) -> dict[str, jax.Array]:
    old = jnp.atleast_2d(jnp.float32(old))
    return {
        OLD_LOGPROBS: old,
        ADVANTAGES: jnp.broadcast_to(jnp.float32(gain), old.shape),
        COPIES: jnp.broadcast_to(jnp.float32(copies), old.shape),
        "target_mask": jnp.broadcast_to(mask, old.shape),
        "segment_ids": jnp.broadcast_to(segments, old.shape),
    }


def gradient(objective, new, rows):
    """Of the loss with respect to the tokens' log-probabilities."""
    return np.asarray(jax.grad(lambda x: objective.loss(-x, rows)[0])(jnp.atleast_2d(jnp.float32(new))))[0]


@pytest.mark.parametrize(
    ("moved", "gain", "expected"),
    [
        (0.0, 2.0, -2.0), (0.0, -2.0, 2.0),  # on-policy: −A
        (0.2, 1.0, -np.exp(0.2)), (0.3, 1.0, 0.0),  # 1.35 is beyond 1 + 0.28
        (-0.5, 1.0, -np.exp(-0.5)),  # it may be brought back
        (-0.2, -1.0, np.exp(-0.2)), (-0.3, -1.0, 0.0), (0.5, -1.0, np.exp(0.5)),
    ],
)  # fmt: skip
def test_the_gradient_of_a_token_is_minus_ratio_times_advantage_within_the_clip(moved, gain, expected):
    objective = Grpo(LOW, HIGH, 9.0)
    np.testing.assert_allclose(gradient(objective, [-1.0 + moved], rows([-1.0], gain)), [expected], rtol=1e-6)
    _, stats = objective.loss(jnp.float32([[1.0 - moved]]), rows([-1.0], gain))
    assert means(stats)["clipped"] == (expected == 0)


def test_what_is_no_target_has_no_part_and_copies_count_in_loss_and_denominator():
    objective = Grpo(LOW, HIGH, 9.0)
    some = rows([-1.0, -1.0, -1.0], [1.0, 1.0, -1.0], copies=[1.0, 3.0, 5.0], mask=jnp.array([[True, True, False]]))
    np.testing.assert_allclose(gradient(objective, [-1.0] * 3, some), [-1.0, -3.0, 0.0])
    assert float(objective.denominator({k: v[None] for k, v in some.items()})) == 4


def test_an_answer_that_the_policy_has_moved_away_from_is_left_alone_as_a_whole():
    """Only where its advantage is negative, and only the one sequence of the row."""
    segments, old = jnp.array([[1, 1, 2, 2, 3]]), [-1.0] * 5
    new = [-1.1, -3.0, -1.1, -1.0, -4.0]
    some = rows(old, [-1.0, -1.0, -1.0, -1.0, 1.0], segments=segments)
    free, bound = (gradient(Grpo(0.99, 9.0, limit), new, some) for limit in (9.0, 0.5))
    assert (free != 0).all()
    np.testing.assert_array_equal(bound, np.where(np.array([1, 1, 0, 0, 0]), 0, free))
    _, stats = Grpo(0.99, 9.0, 0.5).loss(-jnp.float32([new]), some)
    assert means(stats)["drifted"] == pytest.approx(0.4)


def batch(microbatches: int, used: int) -> dict[str, np.ndarray]:
    """[M, 2, 16]: two answers of 10 tokens behind prompts of 4 in the `used` first microbatches, then padding."""
    rng = np.random.default_rng(0)
    shape = (microbatches, 2, 16)
    arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    arrays |= {name: np.zeros(shape, np.float32) for name in (OLD_LOGPROBS, ADVANTAGES, COPIES)}
    arrays["target_mask"] = np.zeros(shape, bool)
    ids = rng.integers(3, 500, (used, 2, 15))
    arrays["tokens"][:used, :, :14], arrays["targets"][:used, :, :14] = ids[..., :-1], ids[..., 1:]
    arrays["segment_ids"][:used, :, :14], arrays["positions"][:used, :, :14] = 1, np.arange(14)
    arrays["target_mask"][:used, :, 4:14] = True
    arrays[OLD_LOGPROBS][:used, :, 4:14] = -6.0
    arrays[ADVANTAGES][:used, :, 4:14] = rng.normal(size=(used, 2, 1))
    arrays[COPIES][:used, :, 4:14] = rng.integers(1, 4, (used, 2, 1))
    return arrays


def test_microbatches_of_padding_change_nothing_and_there_is_one_denominator():
    """Two microbatches, padded to five, give the update of one microbatch with all their rows."""
    step, base, trained = make()
    step = replace(step, objective=Grpo(LOW, HIGH, 1.0))
    state, two = step.init(trained, jax.random.key(0)), batch(2, 2)
    as_one = {name: array.reshape(1, 4, 16) for name, array in two.items()}
    loss, grads, *_ = jax.jit(step.gradients)(state, base, as_one)
    padded, padded_grads, count, stats = jax.jit(step.gradients)(state, base, batch(5, 2))
    np.testing.assert_allclose(padded, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), padded_grads, grads)
    assert int(count) == 40 and 0 <= means(stats)["clipped"] <= 1


def test_expert_iteration_is_the_cross_entropy_of_its_answers():
    step, base, trained = make()
    some = batch(2, 1)
    losses = [
        float(
            jax.jit(replace(step, objective=objective).gradients)(step.init(trained, jax.random.key(0)), base, some)[0]
        )
        for objective in (None, ExpertIteration())
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
