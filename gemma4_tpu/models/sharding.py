"""Where every array lives: rules from tensor names to mesh axes.

Three axes. `dp` splits the rows of a batch only, every weight is there as often; `fsdp` splits the rows and one dim of
each weight; `tp` splits heads, hidden units and the vocabulary. A dim that its axis does not divide is replicated over
that axis, which is reported once by `replicated`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DP, FSDP, TP = "dp", "fsdp", "tp"
ROWS = (DP, FSDP)
"""The axes over which the rows of a microbatch are split."""

Axes = str | tuple[str, ...] | None

# By the end of the tensor's Tunix (or Qwix) name. Norms, scalars and the router are small and replicated.
_RULES: dict[str, tuple[Axes, ...]] = {
    "embedder.input_embedding": (TP, FSDP),
    "embedder.per_layer_model_projection.w": (FSDP, None, TP),
    "embedder.per_layer_input_embedding": (TP, FSDP),
    "q_einsum.w": (TP, FSDP, None),
    "k_einsum.w": (TP, FSDP, None),
    "kv_einsum.w": (None, TP, FSDP, None),
    "attn_vec_einsum.w": (TP, None, FSDP),
    "gate_proj.kernel": (FSDP, TP),
    "up_proj.kernel": (FSDP, TP),
    "down_proj.kernel": (TP, FSDP),
    "moe.gating_einsum": (None, None, (FSDP, TP), None),
    "moe.linear": (None, (FSDP, TP), None),
    "per_layer_input_gate.w": (FSDP, None),
    "per_layer_projection.w": (None, FSDP),
    "q_einsum.w_lora_a": (FSDP, None),
    "q_einsum.w_lora_b": (None, TP, None),
    "k_einsum.w_lora_a": (FSDP, None),
    "k_einsum.w_lora_b": (None, TP, None),
    "kv_einsum.w_lora_a": (FSDP, None),
    "kv_einsum.w_lora_b": (None, None, TP, None),
    "attn_vec_einsum.w_lora_a": (TP, None, None),
    "attn_vec_einsum.w_lora_b": (None, FSDP),
    "gate_proj.kernel_lora_a": (FSDP, None),
    "gate_proj.kernel_lora_b": (None, TP),
    "up_proj.kernel_lora_a": (FSDP, None),
    "up_proj.kernel_lora_b": (None, TP),
    "down_proj.kernel_lora_a": (TP, None),
    "down_proj.kernel_lora_b": (None, FSDP),
}

# Activations by their dims: B rows, T tokens, D model, N heads, H head width, F hidden units, V vocabulary, P per-layer
# embedding, L layers; S: tokens split over tp (the residual stream).
_ACTIVATIONS: dict[str, tuple[Axes, ...]] = {
    "BT": (ROWS, None),
    "BS": (ROWS, TP),
    "BTD": (ROWS, None, None),
    "BSD": (ROWS, TP, None),
    "LBSP": (None, ROWS, TP, None),
    "BTNH": (ROWS, None, TP, None),
    "2BTNH": (None, ROWS, None, TP, None),
    "BTF": (ROWS, None, TP),
    "BTV": (ROWS, None, TP),
    "VD": (TP, None),
    "MBT": (None, ROWS, None),
}


def make_mesh(fsdp: int, tp: int, devices: Sequence[Any] | None = None, *, dp: int = 1) -> Mesh:
    """A mesh with axes (`dp`, `fsdp`, `tp`) over `devices` (default: all), in an order that suits the interconnect.

    Absent devices are laid out like real ones, so that a plan compiles the program that training runs. An axis may take
    part of a torus axis: without that JAX refuses legal meshes, such as 2 × 2 × 4 on a v5p-32.
    """
    shape = (dp, fsdp, tp)
    chosen = (jax.devices() if devices is None else list(devices))[: math.prod(shape)]
    return Mesh(create_device_mesh(shape, chosen, allow_split_physical_axes=True), (DP, FSDP, TP))


def row_places(mesh: Mesh) -> int:
    """Places among which the rows of a microbatch are split."""
    return _size(ROWS, mesh)


def axes_of(axes: Axes) -> tuple[str, ...]:
    """The axes of one dim as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _fit(axes: Sequence[Axes], shape: Sequence[int], mesh: Mesh) -> list[Axes]:
    """`axes` where they divide their dim, None (replicated) where they don't."""
    return [a if a and size % _size(a, mesh) == 0 else None for a, size in zip(axes, shape, strict=False)]


def _size(axes: Axes, mesh: Mesh) -> int:
    return math.prod(mesh.shape[a] for a in axes_of(axes))


def rule(name: str) -> tuple[Axes, ...]:
    """Axes for the tensor with this Tunix or Qwix name; `()` means replicated."""
    matches = [axes for suffix, axes in _RULES.items() if name == suffix or name.endswith("." + suffix)]
    return matches[0] if matches else ()


def spec(name: str, shape: tuple[int, ...], mesh: Mesh, *, stacked: bool = False) -> P:
    """PartitionSpec of the array; `shape` is that of one tensor, a stacked array has one more leading dim."""
    return P(*([None] if stacked else []), *_fit(rule(name), shape, mesh))


def replicated(name: str, shape: tuple[int, ...], mesh: Mesh) -> list[str]:
    """Axes larger than 1 that the rules wanted and `shape` does not allow, as `name dim 3 (6) over tp=4`."""
    return [
        f"{name} dim {i} ({shape[i]}) over {'·'.join(axes_of(axes))}={_size(axes, mesh)}"
        for i, axes in enumerate(rule(name))
        if axes and shape[i] % _size(axes, mesh)
    ]


def named(mesh: Mesh, name: str, shape: tuple[int, ...], *, stacked: bool = False) -> NamedSharding:
    """`spec` bound to `mesh`."""
    return NamedSharding(mesh, spec(name, shape, mesh, stacked=stacked))


def batch(mesh: Mesh) -> NamedSharding:
    """Sharding of the [M, B, T] arrays of an update."""
    return NamedSharding(mesh, P(*_ACTIVATIONS["MBT"]))


def activation_spec(dims: str, shape: Sequence[int], mesh: Mesh) -> P:
    """PartitionSpec of an activation with these dims."""
    return P(*_fit(_ACTIVATIONS[dims], shape, mesh))


def gathered(weight: Any, name: str, mesh: Mesh | None) -> Any:
    """Pins a layer's weight (a QArray: in its few bits) to its places with the `fsdp` axis left out: it is gathered.

    Left to itself, the TPU compiler passes pieces around and adds up a product for each of them: with eight chips on
    the axis a small model's activations move eight times through HBM (E2B on v6e-8: 2.1 times the HBM traffic).
    """
    if mesh is None or mesh.shape[FSDP] == 1:
        return weight
    axes = [tuple(a for a in axes_of(dim) if a != FSDP) or None for dim in rule(name)]

    def place(x: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, P(*_fit(axes, x.shape, mesh)))

    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place(x)), weight)


def constrain(x: jax.Array, dims: str, mesh: Mesh | None) -> jax.Array:
    """Pins an activation with these dims (`"BTD"`, `"BTNH"`, …) to the mesh; a dim that does not divide stays whole."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, activation_spec(dims, x.shape, mesh)))
