"""QLoRA: the frozen base weights of adapted modules in 4 or 8 bits, by Qwix.

`int8` keeps one scale per output unit, `nf4` (NormalFloat-4) one per `NF4_TILE` input units of an output unit (for
experts, whose hidden units are split among chips, per the same number of values along the model dim, which no chip
splits, so that values do not depend on the mesh). A weight is dequantised to the compute dtype only where it is used;
weights without an adapter are not quantised.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import Mesh, NamedSharding

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models import sharding
from gemma4_tpu.models.int8 import Int8Weight
from gemma4_tpu.models.layout import Leaf

NF4_TILE = 64
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of the codes 0 to 15, before scaling (*quoted*: QLoRA, arXiv 2305.14314, appendix E)."""


def is_quantized(leaf: Leaf, lora: LoraConfig) -> bool:
    """Whether this base weight is stored quantised under `lora.quantize`."""
    return lora.quantize is not None and leaf.adapted is not None


def quantize(leaf: Leaf, weight: jax.Array, qtype: str) -> qwix.QArray:
    """A stacked weight [R, …] as a quantised array."""
    inputs = [i for i, dim in enumerate(leaf.dims, 1) if dim in leaf.weight.inputs]  # from 1, after the repeats
    if qtype in ("int8", "int8_compute"):
        held = qwix.quantize(weight, "int8", channelwise_axes=[i for i in range(weight.ndim) if i not in inputs])
        as_int8 = qtype == "int8_compute" and not leaf.weight.each
        return Int8Weight(held.qvalue, held.scale, qtype=held.qtype) if as_int8 else held
    tiled = weight.ndim - 1 if leaf.weight.each else inputs[-1]
    own_scale = [i for i in range(weight.ndim) if i != tiled]
    tile = math.gcd(weight.shape[tiled], NF4_TILE)
    return qwix.quantize(weight, "nf4", channelwise_axes=own_scale, tiled_axes={tiled: tile})


def dense(weight: Any, dtype: Any) -> jax.Array:
    """A base weight in the compute dtype; quantised ones (QLoRA) are dequantised for this use only."""
    return dequantize(weight, dtype) if isinstance(weight, qwix.QArray) else weight.astype(dtype)


def dequantize(weight: qwix.QArray, dtype: Any) -> jax.Array:
    """The weight that a quantised array represents, equal to `qwix.dequantize`.

    NF4 codes are decoded by their bits, which XLA fuses into one elementwise loop. Qwix gathers from a table over the
    flattened array, which a TPU turns into passes over copies: nine tenths of a 31B update's HBM traffic.
    """
    if weight.qtype != "nf4":
        return qwix.dequantize(weight).astype(dtype)
    shape, tiles = weight.qvalue.shape, weight.scale.shape
    by_tile = [n for size, count in zip(shape, tiles, strict=True) for n in (count, size // count)]
    scale = weight.scale.reshape([n for count in tiles for n in (count, 1)])
    codes = weight.qvalue.reshape(by_tile).astype(jnp.int32)
    values = [jnp.asarray(value, scale.dtype) for value in NF4_VALUES]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return (values[0] * scale).reshape(shape).astype(dtype)


def quantizer(leaf: Leaf, qtype: str | None, mesh: Mesh) -> Any:
    """The compiled function that quantises this weight (`is_quantized`) on the mesh and frees the original."""
    assert qtype is not None
    axes = tuple(sharding.spec(mesh, leaf))

    def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, sharding.fit(axes, x.shape, mesh))

    run = partial(quantize, leaf, qtype=qtype)
    shapes = jax.eval_shape(run, jax.ShapeDtypeStruct(leaf.array_shape, "bfloat16"))
    return jax.jit(run, out_shardings=jax.tree.map(place, shapes))
