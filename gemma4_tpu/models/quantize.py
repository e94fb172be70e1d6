"""QLoRA: the frozen base weights of the adapted modules in 4 or 8 bits, by Qwix.

`int8` keeps one scale per output unit, `nf4` (NormalFloat-4) one per `NF4_TILE` input units of an output unit. A weight
is dequantised to the compute dtype where it is used and nowhere else; everything without an adapter stays as it is.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import qwix
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import sharding
from gemma4_tpu.models.layout import Leaf

NF4_TILE = 64


def is_quantized(leaf: Leaf, lora: LoraConfig) -> bool:
    """Whether this base weight is held quantised under `lora.quantize`."""
    return lora.quantize is not None and adapters.role_of(leaf) in lora.targets


def quantize(leaf: Leaf, weight: jax.Array, qtype: str) -> qwix.QArray:
    """A stacked weight [R, …] as a quantised array."""
    inputs = [i + 1 for i in adapters.input_dims(leaf)]  # + 1: the repeats
    if qtype == "int8":
        return qwix.quantize(weight, "int8", channelwise_axes=[i for i in range(weight.ndim) if i not in inputs])
    tiled = inputs[-1]
    own_scale = [i for i in range(weight.ndim) if i != tiled]
    tile = math.gcd(weight.shape[tiled], NF4_TILE)
    return qwix.quantize(weight, "nf4", channelwise_axes=own_scale, tiled_axes={tiled: tile})


def quantizer(leaf: Leaf, qtype: str | None, mesh: Mesh) -> Any:
    """The compiled function that quantises this weight (`is_quantized`) on the mesh and frees the original."""
    assert qtype is not None
    name, shape = leaf.tunix_names[0], leaf.array_shape
    axes = (*sharding.spec(name, leaf.shape, mesh, stacked=True), *[None] * len(shape))[: len(shape)]

    def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
        fits = [a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, x.shape, strict=False)]
        return NamedSharding(mesh, P(*fits))

    run = partial(quantize, leaf, qtype=qtype)
    shapes = jax.eval_shape(run, jax.ShapeDtypeStruct(shape, "bfloat16"))
    return jax.jit(run, out_shardings=jax.tree.map(place, shapes))
