"""How every array is sharded on a mesh: the axes of its dims (for weights, those of `weights.py`), where they divide.

There are four axes. `dp` splits the rows of a batch, with weights replicated; `fsdp` splits the rows and one dim of
each weight; `cp` splits the tokens of each row (`context_parallel.py`), with weights replicated; `tp` splits heads,
hidden units and the vocabulary. A dim that its axis does not divide is replicated over that axis, which `replicated`
reports once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_tpu.models.layout import Layout, Leaf
from gemma4_tpu.models.weights import FSDP, TP, Axes, Weight

DP, CP = "dp", "cp"
ROWS = (DP, FSDP)
"""The axes over which the rows of a microbatch are split."""

# Dims of activations: B rows, T tokens, D model, N heads, H head width, F hidden units, V vocabulary, P per-layer
# embedding, L layers, M microbatches; S: tokens split over tp, too (the residual stream). The others are not split.
_ACTIVATION_AXES: dict[str, Axes] = {"B": ROWS, "T": CP, "S": (CP, TP), "N": TP, "F": TP, "V": TP}


def make_mesh(fsdp: int, tp: int, devices: Sequence[Any] | None = None, *, dp: int = 1, cp: int = 1) -> Mesh:
    """A mesh with axes (`dp`, `fsdp`, `cp`, `tp`) over `devices` (default: all), in an order that suits the
    interconnect. Without context parallelism there is no axis `cp`, and the program is the same as before it existed.

    Devices described ahead of time are laid out like real ones, so that a plan compiles the program that training runs.
    An axis can take part of a torus axis; without that, JAX refuses legal meshes such as 2 × 2 × 4 on a v5p-32.
    """
    sizes = {DP: dp, FSDP: fsdp, CP: cp, TP: tp}
    if cp == 1:
        del sizes[CP]
    shape = tuple(sizes.values())
    chosen = (jax.devices() if devices is None else list(devices))[: math.prod(shape)]
    return Mesh(create_device_mesh(shape, chosen, allow_split_physical_axes=True), tuple(sizes))


def row_places(mesh: Mesh) -> int:
    """Number of parts into which the rows of a microbatch are split."""
    return _size(ROWS, mesh)


def token_parts(mesh: Mesh | None) -> int:
    """Number of parts into which the tokens of a row are split over `cp`."""
    return mesh.shape.get(CP, 1) if mesh is not None else 1


def axes_of(axes: Axes) -> tuple[str, ...]:
    """The axes of one dim as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def fit(axes: Sequence[Axes], shape: Sequence[int], mesh: Mesh) -> P:
    """PartitionSpec of `axes` where they divide their dim, and None (replicated) elsewhere."""
    there = (tuple(a for a in axes_of(dim) if a in mesh.shape) for dim in axes)
    return P(*(a if a and size % _size(a, mesh) == 0 else None for a, size in zip(there, shape, strict=False)))


def _size(axes: Axes, mesh: Mesh) -> int:
    return math.prod(mesh.shape[a] for a in axes_of(axes))


def spec(mesh: Mesh, leaf: Leaf) -> P:
    """PartitionSpec of a leaf's array; the dim that counts repeats is never split."""
    return P(*([None] if leaf.stacked else []), *fit(leaf.axes, leaf.shape, mesh))


def named(mesh: Mesh, leaf: Leaf) -> NamedSharding:
    """`spec` bound to `mesh`."""
    return NamedSharding(mesh, spec(mesh, leaf))


def places(layout: Layout, mesh: Mesh) -> dict[str, Any]:
    """`named` of every base weight, as the tree of `layout`."""
    return layout.tree(lambda leaf: named(mesh, leaf))


def replicated(mesh: Mesh, leaf: Leaf) -> list[str]:
    """Axes larger than 1 that should split a leaf's dims but cannot, as `name dim 3 (6) over tp=4`."""
    return [
        f"{leaf.tunix_names[0]} dim {i} ({size}) over {'·'.join(axes_of(axes))}={_size(axes, mesh)}"
        for i, (axes, size) in enumerate(zip(leaf.axes, leaf.shape, strict=False))
        if axes and size % _size(axes, mesh)
    ]


def batch(mesh: Mesh) -> NamedSharding:
    """Sharding of the [M, B, T] arrays of an update."""
    return NamedSharding(mesh, P(None, ROWS, CP if CP in mesh.shape else None))


def activation_spec(dims: str, shape: Sequence[int], mesh: Mesh) -> P:
    """PartitionSpec of an activation with these dims."""
    return fit([_ACTIVATION_AXES.get(dim) for dim in dims], shape, mesh)


def gathered(array: Any, weight: Weight, mesh: Mesh | None) -> Any:
    """Pins a layer's weight (a QArray in its quantised form) to its sharding without the `fsdp` axis, which gathers it.

    Otherwise, the TPU compiler passes pieces around and accumulates one product for each: with eight chips on the axis,
    a small model's activations move through HBM eight times (E2B on v6e-8: 2.1 times the HBM traffic).
    """
    if mesh is None or mesh.shape[FSDP] == 1:
        return array
    axes = [tuple(a for a in axes_of(dim) if a != FSDP) or None for dim in weight.axes_of(weight.dims)]

    def place(x: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, fit(axes, x.shape, mesh))

    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place(x)), array)


def whole(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Pins an array to be whole on every device, so that every process can read it."""
    return constrain(x, "?" * x.ndim, mesh)


def constrain(x: jax.Array, dims: str, mesh: Mesh | None) -> jax.Array:
    """Pins an activation with these dims (`"BTD"`, `"BTNH"`, …) to the mesh; dims that do not divide are not split."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, activation_spec(dims, x.shape, mesh)))
