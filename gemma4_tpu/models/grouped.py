"""Grouped products: rows sorted by expert, each multiplied with its expert's matrix.

On a TPU, XLA's `ragged_dot` requires the matrices of one layer in a separate array, with the contracted dim first. For
stacked layers, whose matrices are used in both orientations in the forward and backward pass, it copies all experts of
a layer six times per update (26B-A4B on a v5p-8: 127 or 254 MB per chip each time). JAX's kernel (megablox) accepts
either orientation and reads the matrices in place: a layer is an offset of so many experts in the stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from gemma4_tpu.models.quantize import dense

TILE_ROWS = 128
"""Rows per kernel tile; a tile with rows of several experts is computed once for each of them."""
TILE_VALUES = 2**20
"""Values of a matrix in on-chip memory at a time, double-buffered: 4 MB in bfloat16."""
_BY_LAST_DIM, _BY_FIRST_DIM = (
    jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (dim,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    for dim in (2, 1)
)
"""Rows [N, D] times matrices [E, F, D]; rows [N, F] times matrices [E, F, D]."""


@partial(jax.tree_util.register_dataclass, data_fields=["stack", "layer"], meta_fields=["interpret"])
@dataclass(frozen=True)
class InStack:
    """A frozen weight of one layer, left in place in its stack."""

    stack: Any
    """[R, E, …]"""
    layer: Any
    """int32: index into R."""
    interpret: bool
    """Run the kernel in plain Python, on a CPU (for tests)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's own weight."""
        return self.stack.shape[1:]


def grouped(rows: jax.Array, weight: Any, group_sizes: jax.Array, *, last: bool) -> jax.Array:
    """Multiplies each row with its expert's matrix, or with the transpose.

    Args:
      rows: [N, D] (`last`) or [N, F], in expert order.
      weight: [E, …, D], where F is all dims between; can be quantised or `InStack`.
      group_sizes: [E] int32, rows of each expert; N in total.
      last: D is contracted.

    Returns:
      [N, F] (`last`) or [N, D].
    """
    if isinstance(weight, InStack):
        if len(rows) % TILE_ROWS == 0:
            stack = weight.stack.astype(rows.dtype)
            stack = stack.reshape(stack.shape[0], stack.shape[1], -1, stack.shape[-1])  # [R, E, F, D]
            return _kernel(rows, stack, weight.layer, group_sizes, last, weight.interpret)
        weight = jax.lax.dynamic_index_in_dim(weight.stack, weight.layer, keepdims=False)
    matrices = dense(weight, rows.dtype).reshape(weight.shape[0], -1, weight.shape[-1])
    return jax.lax.ragged_dot_general(rows, matrices, group_sizes, _BY_LAST_DIM if last else _BY_FIRST_DIM)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _kernel(
    rows: jax.Array, stack: jax.Array, layer: jax.Array, group_sizes: jax.Array, last: bool, interpret: bool
) -> jax.Array:
    repeats, experts, *sizes = stack.shape
    made, contracted = sizes if last else sizes[::-1]
    fitting = max(TILE_VALUES // contracted // TILE_ROWS, 1) * TILE_ROWS
    return gmm(
        rows,
        stack.reshape(repeats * experts, *sizes),
        group_sizes,
        rows.dtype,
        (TILE_ROWS, contracted, min(made, fitting)),
        group_offset=-layer * experts,  # start of the stack, relative to this layer's first expert
        transpose_rhs=last,
        interpret=interpret,
    )


_kernel.defvjp(
    lambda rows, stack, layer, sizes, last, interpret: (
        _kernel(rows, stack, layer, sizes, last, interpret),
        (stack, layer, sizes),
    ),
    lambda last, interpret, kept, g: (_kernel(g, *kept, not last, interpret), None, None, None),  # the weight is frozen
)
