"""Grouped products by the TPU kernel, interpreted, are those of `ragged_dot`, from whichever layer of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_tpu.models.grouped import InStack, grouped

LAYERS, E, F, D = 3, 4, 24, 40


@pytest.mark.parametrize("sizes", [(70, 0, 133, 53), (0, 100, 0, 0)], ids=["across tiles", "no whole tiles"])
@pytest.mark.parametrize("last", [True, False])
def test_values_and_gradients_are_those_of_ragged_dot(sizes, last):
    stack = jax.random.normal(jax.random.key(0), (LAYERS, E, 2, F // 2, D))
    rows = jax.random.normal(jax.random.key(1), (sum(sizes), D if last else F))
    g = jax.random.normal(jax.random.key(2), (sum(sizes), F if last else D))

    @jax.jit
    def both(rows, weight):
        out, back = jax.vjp(lambda rows: grouped(rows, weight, jnp.array(sizes, jnp.int32), last=last), rows)
        return out, *back(g)

    for layer in range(LAYERS):
        found = both(rows, InStack(stack, jnp.int32(layer), interpret=True))
        for one, other in zip(found, both(rows, stack[layer]), strict=True):
            # sums of at most 40 products of standard normals in float32, in another order
            np.testing.assert_allclose(one, other, rtol=0, atol=40 * np.finfo(np.float32).eps * 40)
