"""Products with frozen int8 weights in int8 × int8 (`lora.quantize=int8_compute`).

Activations are quantised where they are used, with a scale for each token that fits its largest value. So are the
gradients that come back, as in SwitchBack (arXiv 2304.13013), whose third product, the weight's own gradient, a frozen
weight does not need. Rounding counts as the identity in the backward pass (straight through). There the weight's
scales, one for each output, are inside the sum: the gradient is multiplied by them before it is quantised, as in Qwix's
`QtProvider`, which is not used because it would quantise frozen weights anew in every step and take their gradients.

Tokens that are gathered travel in int8, too.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import Mesh

from gemma4_tpu.models.sharding import constrain
from gemma4_tpu.models.weights import AXES, TP, Weight

TOKENS = "bt"


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def from_model_dim(
    weights: tuple[Weight, ...], mesh: Mesh | None, x: jax.Array, held: list[qwix.QArray]
) -> list[jax.Array]:
    """X · W of weights for the same x [B, S, D]: heads or hidden units of all tokens, [B, T, …]."""
    tokens, scale = _gathered(*_by_token(x, "btd"), mesh)
    made = []
    for weight, w in zip(weights, held, strict=True):
        y = weight.equations[0].split("->")[1]
        summed = jnp.einsum(weight.equations[0], tokens, w.qvalue, preferred_element_type=jnp.int32)
        made.append((summed * _along(scale, TOKENS, y) * _scales(weight, w, y)).astype(x.dtype))
    return made


def _from_model_dim_back(weights: tuple[Weight, ...], mesh: Mesh | None, held: Any, grads: list[jax.Array]) -> Any:
    parts = []
    for weight, w, grad in zip(weights, held, grads, strict=True):
        (x, _), y = _dims(weight)
        gradient, scale = _by_token(grad * _scales(weight, w, y), y)
        summed = _in_parts(y, gradient, weight.dims, w.qvalue, x, mesh)
        parts.append((summed * _along(scale, TOKENS, f"z{x}")).astype(grad.dtype))
    return constrain(_added(reduce(jnp.add, parts)), "BSD", mesh), None


from_model_dim.defvjp(
    lambda weights, mesh, x, held: (from_model_dim(weights, mesh, x, held), held), _from_model_dim_back
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def to_model_dim(weight: Weight, mesh: Mesh | None, x: jax.Array, held: qwix.QArray) -> jax.Array:
    """X · W of heads or hidden units x [B, T, …], [B, S, D]."""
    (dims, _), y = _dims(weight)
    tokens, scale = _by_token(x, dims)
    summed = _in_parts(dims, tokens, weight.dims, held.qvalue, y, mesh)
    made = (summed * _along(scale, TOKENS, f"z{y}") * _scales(weight, held, f"z{y}")).astype(x.dtype)
    return constrain(_added(made), "BSD", mesh)


def _to_model_dim_back(weight: Weight, mesh: Mesh | None, held: qwix.QArray, grad: jax.Array) -> Any:
    (x, w), y = _dims(weight)
    gradient, scale = _gathered(*_by_token(grad * _scales(weight, held, y), y), mesh)
    summed = jnp.einsum(f"{y},{w}->{x}", gradient, held.qvalue, preferred_element_type=jnp.int32)
    return (summed * _along(scale, TOKENS, x)).astype(grad.dtype), None


to_model_dim.defvjp(lambda weight, mesh, x, held: (to_model_dim(weight, mesh, x, held), held), _to_model_dim_back)


def _dims(weight: Weight) -> tuple[list[str], str]:
    """Of the equation `x,w->y`: ([x, w], y)."""
    inputs, y = weight.equations[0].split("->")
    return inputs.split(","), y


def _by_token(x: jax.Array, dims: str) -> tuple[jax.Array, jax.Array]:
    """Int8 values of x and float32 scales [B, T]."""
    tokens = [i for i, dim in enumerate(dims) if dim in TOKENS]
    held = qwix.quantize(x, "int8", channelwise_axes=tokens, scale_dtype=jnp.float32)
    return held.qvalue, held.scale.reshape([x.shape[i] for i in tokens])


def _gathered(values: jax.Array, scale: jax.Array, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Each chip's tokens [B, S, D] and their scales, brought to all that share the rows."""
    values, scale = constrain(values, "BSD", mesh), constrain(scale, "BS", mesh)
    return constrain(values, "BTD", mesh), constrain(scale, "BT", mesh)


def _scales(weight: Weight, held: qwix.QArray, dims: str) -> jax.Array:
    """Of a weight's outputs, along something with these dims."""
    sizes = [size for dim, size in zip(weight.dims, held.shape, strict=True) if dim in weight.outputs]
    return _along(held.scale.reshape(sizes), weight.outputs, dims)


def _along(values: jax.Array, own: str, dims: str) -> jax.Array:
    """With dims of one wherever `dims` has more than its own."""
    return jnp.expand_dims(values, [i for i, dim in enumerate(dims) if dim not in own])


def _in_parts(x: str, values: jax.Array, w: str, weight: jax.Array, y: str, mesh: Mesh | None) -> jax.Array:
    """The int32 product `x,w->y` where chips hold parts of what is summed: each chip's part [z, …].

    So parts are scaled and rounded before they travel: the compiler would add them up in int32, twice the bytes.
    """
    dim = next(dim for dim in x if dim in w and AXES.get(dim) == TP)
    size = weight.shape[w.index(dim)]
    chips = mesh.shape[TP] if mesh is not None and size % mesh.shape[TP] == 0 else 1

    def parted(array: jax.Array, dims: str) -> tuple[jax.Array, str]:
        at = dims.index(dim)
        return array.reshape(
            *array.shape[:at], chips, size // chips, *array.shape[at + 1 :]
        ), f"{dims[:at]}z{dims[at:]}"

    (values, x), (weight, w) = parted(values, x), parted(weight, w)
    return jnp.einsum(f"{x},{w}->z{y}", values, weight, preferred_element_type=jnp.int32)


def _added(parts: jax.Array) -> jax.Array:
    """The sum over the first dim in the dtype of the parts, which may have to travel."""
    return jax.lax.reduce(parts, jnp.zeros((), parts.dtype), jax.lax.add, (0,))
