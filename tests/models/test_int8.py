"""Products in int8 are as near to those of dequantised weights as rounding by token allows, both ways, on a mesh."""

from math import sqrt

import jax
import jax.numpy as jnp
import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models import int8, quantize, sharding
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.weights import BY_NAME

B, T = 2, 8
LORA = LoraConfig(quantize=quantize.COMPUTE)
ROUNDING = 3.5 / 127 / sqrt(12)
"""Relative: the largest of some hundred normal values is about 3.5 σ, and is 127 steps; a value is off by step/√12."""


def held(name: str):
    """A layer's weight in int8, and the same dense."""
    leaf = next(leaf for leaf in Layout.of(ARCHITECTURES["tiny"], LORA).leaves() if leaf.weight.name == name)
    weight = jax.random.normal(jax.random.key(1), (1, *leaf.shape), jnp.float32)
    array = jax.tree.map(lambda x: x[0], quantize.quantize(leaf, weight, quantize.COMPUTE))
    return array, quantize.dense(array, jnp.float32)


def off(found, wanted) -> float:
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize(
    "name", ["attn.q_einsum.w", "attn.kv_einsum.w", "mlp.gate_proj.kernel", "attn.attn_vec_einsum.w"]
)
def test_products_and_gradients_round_by_token(name, tp):
    weight, mesh = BY_NAME[name], sharding.make_mesh(1, tp, jax.devices()[:tp])
    array, dense = held(name)
    size = dict(zip(weight.dims, dense.shape, strict=True)) | {"b": B, "t": T}
    (x_dims, _), y_dims = int8._dims(weight)
    x, dy = (
        jax.random.normal(jax.random.key(i), [size[dim] for dim in dims]) for i, dims in enumerate((x_dims, y_dims))
    )

    def ours(x):
        if "d" in weight.inputs:
            return int8.from_model_dim((weight,), mesh, x, [array])[0]
        return int8.to_model_dim(weight, mesh, x, array)

    found, back = jax.jit(lambda x, dy: (lambda y, pull: (y, pull(dy)[0]))(*jax.vjp(ours, x)))(x, dy)
    wanted, pull = jax.vjp(lambda x: jnp.einsum(weight.equations[0], x, dense), x)
    assert 0.3 * ROUNDING < off(found, wanted) < 2 * ROUNDING
    assert 0.3 * ROUNDING < off(back, pull(dy)[0]) < 2 * ROUNDING
