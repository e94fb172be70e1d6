"""Divergence from a teacher against PyTorch's, one denominator, and a student that comes nearer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma4_tpu.step.distill import Distill, DistillOwn, Divergence, DivergenceOfTop
from gemma4_tpu.step.grpo import COPIES
from gemma4_tpu.step.loss import Head, token_losses
from gemma4_tpu.step.objective import TEACHER
from tests.step.test_train_step import gradients, make, make_batch, regroup, relative_difference, started

B, T, D, V = 2, 24, 16, 96
CAP, TEACHERS_CAP = 5.0, 8.0


@pytest.fixture(scope="module")
def arrays():
    """Hidden states and output matrix of a student, of a teacher of another width, and weights of the tokens."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, D), (V, D), (B, T, 10), (V, 10)]
    hidden, table, its_hidden, its_table = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return 3 * hidden, table, 3 * its_hidden, its_table, rng.normal(size=(B, T)).astype(np.float32)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("rows", [None, (), (3, 90)], ids=["frozen", "table", "rows"])
def test_value_and_gradient_are_those_of_pytorch(arrays, kind, rows):
    torch = pytest.importorskip("torch")
    hidden, table, its_hidden, its_table, weights = arrays

    def ours(hidden, table):
        score = Divergence(kind, TEACHERS_CAP, None)
        each = token_losses(hidden, table, its_hidden, its_table, score, Head(CAP, 8, rows))
        return (each * weights).sum(), each

    (_, each), grads = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, table)

    h, w, its_h, its_w = (torch.tensor(x, dtype=torch.float64) for x in arrays[:4])
    h.requires_grad_()
    w.requires_grad_()
    p, q = (
        torch.log_softmax(torch.tanh(x @ y.T / cap) * cap, -1)
        for x, y, cap in ((h, w, CAP), (its_h, its_w, TEACHERS_CAP))
    )
    input_, target = (q, p) if kind == "reverse" else (p, q)  # PyTorch's is KL(target ‖ input)
    expected = torch.nn.functional.kl_div(input_, target, reduction="none", log_target=True).sum(-1)
    (expected * torch.tensor(weights, dtype=torch.float64)).sum().backward()
    # float32 sums of 96 terms of about 1, beside float64
    np.testing.assert_allclose(each, expected.detach(), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(grads[0], h.grad, rtol=1e-4, atol=2e-5)
    wanted = np.zeros((V, D)) if rows is None else w.grad.numpy()
    if rows:
        wanted = np.where(np.isin(np.arange(V), rows)[:, None], wanted, 0.0)
    np.testing.assert_allclose(grads[1], wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
def test_of_some_tokens_and_all_others_it_is_a_lower_bound_that_grows_to_the_whole(arrays, kind):
    hidden, table, its_hidden, its_table, weights = arrays
    cap, its_cap = 2.0, 3.0  # flat enough that no token is rarer than 1e-6
    teacher = jax.nn.log_softmax(its_cap * jnp.tanh(its_hidden @ its_table.T / its_cap), axis=-1)
    score = Divergence(kind, its_cap, None)
    whole = token_losses(hidden, table, its_hidden, its_table, score, Head(cap, 8))
    below = np.zeros_like(whole)
    for top in (1, 8, V - 1):
        logprobs, tokens = jax.lax.top_k(teacher, top)

        def of_top(hidden, told=(tokens, logprobs)):
            return token_losses(hidden, table, told, None, DivergenceOfTop(kind), Head(cap, 8))

        found = of_top(hidden)
        assert (found > below - 1e-4).all() and (found < whole + 1e-4).all()
        below = found
    # the one token that is left is "any other": 1 less a float32 sum, which is off by 1e-7 of at least 1e-5
    np.testing.assert_allclose(found, whole, rtol=1e-2, atol=1e-3)
    ours, exact = (
        jax.grad(lambda h, f=f: (weights * f(h)).sum())(jnp.array(hidden))
        for f in (of_top, lambda h: token_losses(h, table, its_hidden, its_table, score, Head(cap, 8)))
    )
    np.testing.assert_allclose(ours, exact, rtol=1e-2, atol=1e-2)


def taught(objective):
    """(step, base with a teacher, student): the student without adapters, the teacher with them."""
    step, base, trained = make()
    params, lora = step.weights(trained, base)
    step = replace(step, objective=objective, teacher=step.model)
    return step, base | {TEACHER: {"params": params, "lora": lora}}, trained


@pytest.mark.slow
def test_a_teacher_is_no_distance_from_itself_and_a_student_comes_nearer():
    step, base, trained = taught(Distill("reverse"))
    batch = make_batch(4)
    loss, grads, *_ = gradients(step, base, trained, batch)
    assert abs(float(loss)) < 1e-6 and float(optax.global_norm(grads)) < 1e-4
    state, train = started(step, jax.tree.map(lambda x: x * 0.5, trained)), jax.jit(step.train)
    losses = []
    for _ in range(8):
        state, metrics = train(state, base, batch)
        losses.append(float(metrics.loss))
    assert losses[0] > 1e-3 and losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_equal_answers_count_each_and_microbatches_of_uneven_weight_equal_the_whole():
    step, base, trained = taught(DistillOwn("forward"))
    student, batch = jax.tree.map(lambda x: x * 0.5, trained), make_batch(4)
    batch[COPIES] = np.random.default_rng(5).integers(1, 4, batch["tokens"].shape).astype(np.float32)
    batch["target_mask"][:, 3] = False
    (loss, grads, *_), (again, again_grads, *_) = (
        gradients(step, base, student, regroup(batch, microbatches)) for microbatches in (1, 4)
    )
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    assert relative_difference(again_grads, grads) < 2e-5
    rows = {name: jnp.asarray(array[0]) for name, array in batch.items()}
    each = np.asarray(jax.jit(step.divergence)(student, base, rows), np.float64)
    weights = np.where(batch["target_mask"][0], batch[COPIES][0], 0)
    np.testing.assert_allclose(loss, (each * weights).sum() / weights.sum(), rtol=1e-5)
    held, count, _ = jax.jit(step.evaluate)(student, base, batch)  # held-out rows: each token once
    np.testing.assert_allclose(held / count, each[batch["target_mask"][0]].mean(), rtol=1e-5)
