"""Attention paths against a definition written out token by token."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu import attention as attention_of_triton

from gemma4_tpu.models import sharding
from gemma4_tpu.models.attention import einsum_attention
from gemma4_tpu.models.chunked import attention_of, chunked_attention
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
    ours = jax.jit(partial(einsum_attention, window=window))(*map(jnp.asarray, (q, k, v, segments)))
    # fp32 against float64: scores up to about 10, sums of at most 32 terms
    np.testing.assert_allclose(ours, by_definition(q, k, v, segments, window), atol=1e-5)


def total(attention, weight, segments, window, *given):
    return (attention(*given, segments, window) * weight).sum()


@pytest.mark.parametrize("window", [None, 5, 20])
def test_chunked_attention_is_einsum_attention_in_values_and_gradients(window):
    """Blocks of 8 in rows of 50: examples that share a block, span several, or fill the row; padding, too."""
    rng = np.random.default_rng(0)
    q, weight = (jnp.asarray(rng.normal(size=(2, 50, 4, 8)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 50, 2, 8)), jnp.float32) for _ in range(2))
    segments = jnp.asarray([[1] * 13 + [2] * 9 + [3] * 20 + [0] * 8, [1] * 50], jnp.int32)

    def chunked(q, k, v, segments, window):
        return attention_of(q, k, v, segments, segments, jnp.int32(0), window, block=8)

    (value, grads), (wanted, of_wanted) = (
        jax.jit(jax.value_and_grad(partial(total, f, weight, segments, window), argnums=(0, 1, 2)))(q, k, v)
        for f in (chunked, einsum_attention)
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for got, gradient in zip(grads, of_wanted, strict=True):
        # fp32 both, sums of at most 50 terms in another order: a few roundings of 1.2e-7
        np.testing.assert_allclose(got, gradient, atol=5e-6 * float(jnp.abs(gradient).max()))


@pytest.mark.parametrize("window", [None, 1024])
def test_chunked_attention_takes_memory_for_the_length_and_not_for_its_square(window):
    """Of the backward pass, in a sliding and a global layer; einsum's memory grows by 4 where there is no window."""

    def temporaries(length):
        of = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 2, 1, 1)]
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        run = jax.grad(lambda weight, q, k, v, ids: total(chunked_attention, weight, ids, window, q, k, v), (1, 2, 3))
        return jax.jit(run).lower(*of, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 2 * temporaries(8192)


@pytest.mark.parametrize(("width", "window"), [(256, 1024), (512, None)])
def test_chunked_attention_lowers_for_gpus(width, window):
    """With 31B's heads, in bfloat16, forward and backward; no GPU is needed."""
    keys = 16 if window else 4
    of = [jax.ShapeDtypeStruct((1, 4096, heads, width), jnp.bfloat16) for heads in (32, 32, keys, keys)]
    run = jax.grad(lambda weight, q, k, v, ids: total(chunked_attention, weight, ids, window, q, k, v), (1, 2, 3))
    lowered = jax.export.export(jax.jit(run), platforms=["cuda"])(*of, jax.ShapeDtypeStruct((1, 4096), jnp.int32))
    text = lowered.mlir_module()
    assert "4096x4096" not in text and "custom_call" not in text


def test_padding_gives_finite_values_and_gradients():
    q = jnp.ones((1, 24, 2, 4))
    segments = jnp.zeros((1, 24), jnp.int32)

    def total(q):
        return einsum_attention(q, q, q, segments, 4).sum()

    assert np.isfinite(jax.jit(jax.grad(total))(q)).all()


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
    value, grad = jax.jit(jax.value_and_grad(total))(q)
    assert np.isfinite(value)
    assert np.isfinite(grad[:, 256:]).all()


@pytest.mark.parametrize(("length", "wanted"), [(2048, einsum_attention), (2049, chunked_attention)])
def test_a_cpu_forms_the_scores_of_short_rows_only(length, wanted):
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    assert make_attention("einsum", mesh) is einsum_attention
    of = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, length), jnp.int32)]
    lowered = [jax.jit(partial(f, window=None)).lower(*of).as_text() for f in (make_attention("auto", mesh), wanted)]
    assert lowered[0].count("while") == lowered[1].count("while")
    assert lowered[0].count("dot_general") == lowered[1].count("dot_general")


def test_jaxs_own_kernels_for_gpus_still_know_no_packed_rows_with_windows():
    """Else `chunked` could go: docs/step.md."""
    assert not [name for name in inspect.signature(jax.nn.dot_product_attention).parameters if "segment" in name]
    assert not [name for name in inspect.signature(attention_of_triton.mha).parameters if "window" in name]
