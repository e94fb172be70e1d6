"""Products of frozen int8 weights with activations that are quantised, too (`lora.quantize=int8_compute`).

Forward, every token gets a scale of its own, the largest of its inputs over 127, as every output of the weight has one;
int8 × int8 products are summed in int32, exactly, whatever the mesh. Backward, the rounding counts as none (straight
through): dx = (dy · scales of the outputs) · codes, a product in the compute dtype, in which every code is exact.
Nothing but the weight is kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import qwix
from jax.sharding import Mesh

from gemma4_tpu.models import sharding
from gemma4_tpu.models.sharding import TP, axes_of, constrain
from gemma4_tpu.models.weights import Weight

LARGEST = 127
"""Of a code, so that codes are symmetric."""


@flax.struct.dataclass
class Int8Weight(qwix.QArray):
    """A weight [dims] in int8, with a scale for each output, whose products are int8 as well."""


def quantised(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Codes (int8) and scales (float32, with dims of 1) of x, quantised over `axes`."""
    wide = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scale = jnp.where(most > 0, most, 1.0) / LARGEST  # of NaN: NaN, and so are the products
    return jnp.round(wide / scale).astype(jnp.int8), scale


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def products(
    weights: tuple[Weight, ...], mesh: Mesh | None, gather: bool, x: jax.Array, held: list[Int8Weight]
) -> list[jax.Array]:
    """X · W of each.

    Args:
      weights: their rows, of the same inputs.
      mesh: where all is placed.
      gather: x holds a chip's own tokens, the products are of all; its codes travel, half the bytes of x.
      x: [B, T, inputs…], or [B, S, D] with `gather`.
      held: the weights.

    Returns:
      [B, T, outputs…] of each, or [c, B, T, …], in x's dtype.
    """
    codes, scale = quantised(x, range(2, x.ndim))
    if gather:  # made where the tokens are: left to itself, the compiler gathers float32 and rounds everywhere
        codes, scale = (constrain(constrain(part, "BSD", mesh), "BTD", mesh) for part in (codes, scale))
    return [_product(*pair, mesh, codes, scale, x.dtype) for pair in zip(weights, held, strict=True)]


def _product(
    weight: Weight, held: Int8Weight, mesh: Mesh | None, codes: jax.Array, scale: jax.Array, dtype: Any
) -> jax.Array:
    """Codes · W, scaled, in `dtype`.

    Where the contracted dim is split over `tp`, each chip scales its part of the sums before they are added up, so that
    two bytes travel for a value and not the four of int32: the part is a dim, z, of which every chip holds one.
    """
    equation, w, parts = weight.equations[0], held.qvalue, 1
    split = _split_input(weight, held.shape, mesh)
    if split:
        assert mesh is not None
        parts = mesh.shape[TP]
        codes = _in_parts(codes, f"bt{weight.inputs}".index(split), parts)
        w = _in_parts(w, weight.dims.index(split), parts)
        operands, made = equation.split("->")
        equation = f"{operands.replace(split, 'z' + split)}->z{made}"
    sums = jnp.einsum(equation, codes, w, preferred_element_type=jnp.int32)
    y = (sums.astype(jnp.float32) * (_of_tokens(scale, weight) * _of_outputs(held, weight))).astype(dtype)
    return jax.lax.reduce(y, jnp.zeros((), dtype), jax.lax.add, (0,)) if split else y


def _split_input(weight: Weight, shape: tuple[int, ...], mesh: Mesh | None) -> str:
    """The contracted dim that is split over `tp`, if any."""
    if mesh is None or mesh.shape[TP] == 1:
        return ""
    places = zip(weight.dims, sharding.fit(weight.axes_of(weight.dims), shape, mesh), strict=False)
    return "".join(dim for dim, axes in places if dim in weight.inputs and TP in axes_of(axes))


def _in_parts(x: jax.Array, axis: int, parts: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])


def _of_tokens(scale: jax.Array, weight: Weight) -> jax.Array:
    """Scales [B, T, 1…] beside what the weight makes."""
    return scale.reshape(*scale.shape[:2], *[1] * len(weight.outputs.replace("c", "")))


def _of_outputs(held: Int8Weight, weight: Weight) -> jax.Array:
    """Scales of the outputs, float32, beside what the weight makes: [1, 1, outputs…], or [c, 1, 1, …]."""
    sizes = dict(zip(weight.dims, held.scale.shape, strict=True))
    several = "c" in weight.outputs
    scale = held.scale.astype(jnp.float32).reshape([sizes[dim] for dim in weight.outputs])
    return jnp.expand_dims(scale, (1, 2) if several else (0, 1))


def _backward(
    weights: tuple[Weight, ...], mesh: Mesh | None, gather: bool, held: list[Int8Weight], grads: list[jax.Array]
) -> tuple[jax.Array, None]:
    parts = []
    for weight, own, g in zip(weights, held, grads, strict=True):
        inputs, made = weight.equations[0].split("->")
        x_dims, w_dims = inputs.split(",")
        scaled = (g.astype(jnp.float32) * _of_outputs(own, weight)).astype(g.dtype)
        parts.append(jnp.einsum(f"{made},{w_dims}->{x_dims}", scaled, own.qvalue.astype(g.dtype)))
    dx = sum(parts[1:], parts[0])
    return constrain(dx, "BSD", mesh) if gather else dx, None


products.defvjp(lambda weights, mesh, gather, x, held: (products(weights, mesh, gather, x, held), held), _backward)
