"""Attention paths against a definition written out token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.models import sharding
from gemma4_tpu.models.attention import einsum_attention
from gemma4_tpu.models.splash import make_attention, splash_attention


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


@pytest.mark.parametrize(("dp", "fsdp", "tp"), [(1, 1, 1), (1, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize(("window", "kv_heads"), [(None, 1), (None, 2), (96, 2), (200, 4)])
def test_the_tpu_kernel_equals_einsum_in_values_and_gradients(window, kv_heads, dp, fsdp, tp):
    """Packed rows with padding; the kernel runs in Pallas' interpreter."""
    mesh = sharding.make_mesh(fsdp, tp, jax.devices()[: dp * fsdp * tp], dp=dp)
    rng = np.random.default_rng(0)
    q, weight = (jnp.asarray(rng.normal(size=(2, 640, 4, 128)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 640, kv_heads, 128)) / 8, jnp.float32) for _ in range(2))
    segments = jnp.asarray([[1] * 190 + [2] * 30 + [3] * 250 + [0] * 170, [1] * 640], jnp.int32)  # 5 blocks of 128

    def total(attention, q, k, v):
        return (attention(q, k, v, segments, window) * weight * (segments > 0)[..., None, None]).sum()

    kernel = partial(splash_attention, mesh=mesh, interpret=True)
    values, grads = zip(
        *(
            jax.jit(jax.value_and_grad(partial(total, f), argnums=(0, 1, 2)))(q, k, v)
            for f in (kernel, einsum_attention)
        ),
        strict=True,
    )
    # fp32 both, blocks of 128 or 256 summed online: relative rounding of about 1e-6 per product
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)
    for got, wanted in zip(*grads, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("window", [None, 300])
def test_blocks_of_other_examples_are_not_computed(window):
    """Values of another example are not even multiplied by zero: NaN there stays there."""
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 640, 2, 128)), jnp.float32)
    poisoned = q.at[:, :256].set(jnp.nan)
    segments = jnp.asarray([[1] * 256 + [2] * 384], jnp.int32)

    def total(q):
        return jnp.where(segments[..., None, None] == 2, attend(q, poisoned, poisoned, segments, window), 0).sum()

    attend = partial(splash_attention, mesh=mesh, interpret=True)
    value, grad = jax.value_and_grad(total)(q)
    assert np.isfinite(value)
    assert np.isfinite(grad[:, 256:]).all()


def test_a_cpu_takes_einsum_unless_told_otherwise():
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    assert make_attention("auto", mesh) is make_attention("einsum", mesh) is einsum_attention
    assert make_attention("splash", mesh) is not einsum_attention
