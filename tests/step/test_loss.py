"""The chunked cross-entropy, summed and of each token, against the plain one, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.step.loss import Head, chunk_length, summed_cross_entropy, token_nll

B, T, D, V = 2, 24, 16, 96


def plain_nll(hidden, table, targets, cap):
    """The definition, with [B, T, V] in full."""
    scores = jnp.einsum("btd,vd->btv", hidden, table)
    if cap is not None:
        scores = jnp.tanh(scores / cap) * cap
    return -jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[..., 0]


def plain(hidden, table, targets, mask, cap):
    return jnp.where(mask, plain_nll(hidden, table, targets, cap), 0.0).sum()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(3 * rng.normal(size=(B, T, D)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    return hidden, table, jnp.asarray(rng.integers(0, V, (B, T))), jnp.asarray(rng.random((B, T)) < 0.6)


@pytest.mark.parametrize("cap", [30.0, 5.0, None])
@pytest.mark.parametrize("chunk", [1, 5, 8, 1000])
def test_equals_the_plain_loss_and_its_gradient(arrays, cap, chunk):
    hidden, table, targets, mask = arrays

    def ours(hidden, table):
        return summed_cross_entropy(hidden, table, targets, mask, Head(cap, chunk, ()))

    value, grads = jax.value_and_grad(ours, argnums=(0, 1))(hidden, table)
    expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(hidden, table, targets, mask, cap)
    # the promise: 1e-5 relative; sums of 48 terms in fp32 differ by a few 1e-7
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_a_frozen_table_gets_no_gradient_and_scales_with_the_cotangent(arrays):
    hidden, table, targets, mask = arrays

    def scaled(hidden, factor):
        return factor * summed_cross_entropy(hidden, table, targets, mask, Head(30.0, 8))

    once, thrice = jax.grad(scaled)(hidden, 1.0), jax.grad(scaled)(hidden, 3.0)
    np.testing.assert_allclose(3 * once, thrice, rtol=1e-6)


def test_masked_targets_do_not_count(arrays):
    hidden, table, targets, mask = arrays
    other = jnp.where(mask, targets, (targets + 1) % V)
    losses = [summed_cross_entropy(hidden, table, t, mask, Head(30.0, 8)) for t in (targets, other)]
    assert losses[0] == losses[1]
    nothing = summed_cross_entropy(hidden, table, targets, jnp.zeros_like(mask), Head(30.0, 8))
    assert nothing == 0.0


@pytest.mark.parametrize("rows", [None, (), (3, 90)], ids=["frozen", "table", "rows"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_losses_of_tokens_add_up_to_the_summed_one_and_so_do_their_gradients(arrays, dtype, rows):
    hidden, table, targets, mask = arrays
    hidden, table = hidden.astype(dtype), table.astype(dtype)

    def summed(hidden, table):
        return summed_cross_entropy(hidden, table, targets, mask, Head(30.0, 8, rows))

    def apart(hidden, table):
        return jnp.where(mask, token_nll(hidden, table, targets, Head(30.0, 8, rows)), 0.0).sum()

    wanted = (0, 1) if rows is not None else 0
    (value, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(loss, argnums=wanted))(hidden, table) for loss in (apart, summed)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # the same 30 float32 values, added in another order
    for got, due in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        got, due = (np.asarray(x, np.float32) for x in (got, due))
        # The same operations in the same order; the compiler fuses them otherwise, which may round a last bit.
        np.testing.assert_allclose(got, due, rtol=0, atol=2 * float(jnp.finfo(dtype).eps) * np.abs(due).max())


@pytest.mark.parametrize("rows", [None, (), (3, 90)], ids=["frozen", "table", "rows"])
def test_each_token_takes_part_by_its_own_weight(arrays, rows):
    """Weights of either sign, that depend on the losses themselves, as objectives' do."""
    hidden, table, targets, _ = arrays
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, T)), jnp.float32)

    def objective(nll):
        return (weights * jnp.tanh(nll / 5)).sum() ** 2

    def ours(hidden, table):
        return objective(token_nll(hidden, table, targets, Head(30.0, 8, rows)))

    def expected(hidden, table):
        return objective(plain_nll(hidden, table, targets, 30.0))

    (value, grads), (due, due_grads) = (jax.value_and_grad(f, argnums=(0, 1))(hidden, table) for f in (ours, expected))
    np.testing.assert_allclose(value, due, rtol=1e-5)
    trained = {None: np.zeros(V, bool), (): np.ones(V, bool)}.get(rows, np.isin(np.arange(V), rows or ()))
    for got, wanted in zip(grads, (due_grads[0], jnp.where(trained[:, None], due_grads[1], 0.0)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(due_grads[0]).max()))


def test_the_whole_vocabulary_is_never_in_memory():
    """At the real vocabulary the compiled gradient needs a fraction of one [B, T, V] array in float32."""
    rows, length, dim, vocab = 1, 2048, 64, 262_144

    def loss(hidden, table, targets, mask):
        return summed_cross_entropy(hidden, table, targets, mask, Head(30.0, 64))

    shapes = [((rows, length, dim), jnp.float32), ((vocab, dim), jnp.float32), ((rows, length), jnp.int32),
              ((rows, length), jnp.bool_)]  # fmt: skip
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*[jax.ShapeDtypeStruct(*s) for s in shapes]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 / 8


@pytest.mark.parametrize(
    ("length", "wanted", "chunk"), [(512, 512, 512), (512, 100, 64), (7, 3, 1), (12, 5, 4), (4, 9, 4)]
)
def test_chunk_length_divides(length, wanted, chunk):
    assert chunk_length(length, wanted) == chunk
