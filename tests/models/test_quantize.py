"""QLoRA: what is quantised, how exactly, and that gradients still reach every adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models import quantize, sharding
from gemma4_tpu.models.layout import Layout


@pytest.mark.parametrize(
    ("qtype", "bits", "error"),
    [
        # int8, one absmax scale per output: the step is absmax/127, its rounding error is step/√12; absmax of 128 to
        # 384 normal values is about 2.9σ, so 2.9/127/√12 ≈ 0.7%, and bfloat16 scales add 0.1%
        ("int8", 8, 0.012),
        # NormalFloat-4 in tiles of 64: its 16 levels leave about 9% of a normal's standard deviation
        ("nf4", 4, 0.11),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_adapted_weights_are_held_in_few_bits(qtype, bits, error, shape):
    mesh = sharding.make_mesh(*shape, jax.devices()[: shape[0] * shape[1]])
    lora = LoraConfig(quantize=qtype)
    layout = Layout.of(ARCHITECTURES["tiny"], lora)
    quantised = [leaf for leaf in layout.leaves() if quantize.is_quantized(leaf, lora)]
    assert {leaf.path[3] for leaf in quantised} == {"attn", "mlp"}
    for leaf in quantised[:7] + quantised[-3:]:
        weight = 0.02 * jax.random.normal(jax.random.key(len(leaf.path)), leaf.array_shape, jnp.bfloat16)
        held = quantize.quantizer(leaf, qtype, mesh)(weight)
        assert jnp.iinfo(held.qvalue.dtype).bits == bits
        assert held.qvalue.sharding.spec == sharding.spec(mesh, leaf)
        wanted, got = np.asarray(weight, np.float32), np.asarray(qwix.dequantize(held), np.float32)
        assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < error
        ours = quantize.dequantize(held, jnp.float32)
        assert np.array_equal(np.asarray(ours), got)  # the bits of Qwix's values


def test_nothing_else_is_quantised():

    def quantised(**settings):
        lora = LoraConfig(**settings)
        leaves = Layout.of(ARCHITECTURES["tiny_moe"], lora).leaves()
        return [leaf for leaf in leaves if quantize.is_quantized(leaf, lora)]

    assert {leaf.path[-1] for leaf in quantised(quantize="nf4")} == {"w", "kernel"}
    assert all("mlp" in leaf.path for leaf in quantised(quantize="nf4", targets=["mlp"]))
    assert not quantised()
