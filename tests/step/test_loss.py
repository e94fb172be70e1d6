"""The chunked cross-entropy against the plain one, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.step.loss import chunk_length, summed_cross_entropy

B, T, D, V = 2, 24, 16, 96


def plain(hidden, table, targets, mask, cap):
    """The definition, with [B, T, V] in full."""
    scores = jnp.einsum("btd,vd->btv", hidden, table)
    if cap is not None:
        scores = jnp.tanh(scores / cap) * cap
    nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, nll, 0.0).sum()


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
        return summed_cross_entropy(hidden, table, targets, mask, cap, chunk, (), None)

    value, grads = jax.value_and_grad(ours, argnums=(0, 1))(hidden, table)
    expected, expected_grads = jax.value_and_grad(plain, argnums=(0, 1))(hidden, table, targets, mask, cap)
    # the promise: 1e-5 relative; sums of 48 terms in fp32 differ by a few 1e-7
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_a_frozen_table_gets_no_gradient_and_scales_with_the_cotangent(arrays):
    hidden, table, targets, mask = arrays

    def scaled(hidden, factor):
        return factor * summed_cross_entropy(hidden, table, targets, mask, 30.0, 8, None, None)

    once, thrice = jax.grad(scaled)(hidden, 1.0), jax.grad(scaled)(hidden, 3.0)
    np.testing.assert_allclose(3 * once, thrice, rtol=1e-6)


def test_masked_targets_do_not_count(arrays):
    hidden, table, targets, mask = arrays
    other = jnp.where(mask, targets, (targets + 1) % V)
    losses = [summed_cross_entropy(hidden, table, t, mask, 30.0, 8, None, None) for t in (targets, other)]
    assert losses[0] == losses[1]
    nothing = summed_cross_entropy(hidden, table, targets, jnp.zeros_like(mask), 30.0, 8, None, None)
    assert nothing == 0.0


def test_the_whole_vocabulary_is_never_in_memory():
    """At the real vocabulary the compiled gradient needs a fraction of one [B, T, V] array in float32."""
    rows, length, dim, vocab = 1, 2048, 64, 262_144

    def loss(hidden, table, targets, mask):
        return summed_cross_entropy(hidden, table, targets, mask, 30.0, 64, None, None)

    shapes = [((rows, length, dim), jnp.float32), ((vocab, dim), jnp.float32), ((rows, length), jnp.int32),
              ((rows, length), jnp.bool_)]  # fmt: skip
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*[jax.ShapeDtypeStruct(*s) for s in shapes]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 / 8


@pytest.mark.parametrize(
    ("length", "wanted", "chunk"), [(512, 512, 512), (512, 100, 64), (7, 3, 1), (12, 5, 4), (4, 9, 4)]
)
def test_chunk_length_divides(length, wanted, chunk):
    assert chunk_length(length, wanted) == chunk
