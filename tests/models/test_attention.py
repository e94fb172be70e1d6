"""Attention paths against a definition written out token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.models.attention import einsum_attention


def by_definition(q, k, v, segments, window):
    """Each query's softmax over the keys it may see, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
        scores = k[b, seen, n // group] @ q[b, t, n]
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 4, 5, 8, 16, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_einsum_attention_is_the_definition(window, heads):
    """Windows that divide T and that do not, below and above T/2; packed rows with padding at the end."""
    rng = np.random.default_rng(0)
    queries, keys = heads
    q = rng.normal(size=(2, 32, queries, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, 32, keys, 8)).astype(np.float32) for _ in range(2))
    segments = np.array([[1] * 13 + [2] * 9 + [3] * 7 + [0] * 3, [1] * 32], np.int32)
    ours = einsum_attention(*map(jnp.asarray, (q, k, v, segments)), window)
    # fp32 against float64: scores up to about 10, sums of at most 32 terms
    np.testing.assert_allclose(ours, by_definition(q, k, v, segments, window), atol=1e-5)


def test_padding_gives_finite_values_and_gradients():
    q = jnp.ones((1, 24, 2, 4))
    segments = jnp.zeros((1, 24), jnp.int32)

    def total(q):
        return einsum_attention(q, q, q, segments, 4).sum()

    assert np.isfinite(jax.grad(total)(q)).all()
