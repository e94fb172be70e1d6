"""The meshes that a model allows on a number of devices, and the one that a configuration means. Imports no JAX."""

from __future__ import annotations

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.machines import MeshConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes

LEAST_TOKENS = 8192
"""Smallest part of a row that is worth splitting off; a search tries no shorter ones."""


def resolve_mesh(mesh: MeshConfig, architecture: Architecture, devices: int) -> MeshSizes:
    """Sizes of the axes on `devices` devices.

    Raises:
      UserError: the sizes do not multiply to `devices`, or tp does not divide the heads evenly; lists the legal meshes.
    """
    legal = legal_meshes(architecture, devices, mesh.cp)
    sizes_given = {"dp": mesh.dp, "fsdp": mesh.fsdp, "tp": mesh.tp, "cp": mesh.cp}
    given = {axis: size for axis, size in sizes_given.items() if size is not None}
    fitting = [sizes for sizes in legal if given.items() <= sizes._asdict().items()]
    if not fitting:
        words = ", ".join(f"mesh.{axis}={size}" for axis, size in given.items() if axis not in ("dp", "cp") or size > 1)
        legal = legal or legal_meshes(architecture, devices)
        listed = [sizes for sizes in legal if sizes.dp == mesh.dp] or [sizes for sizes in legal if sizes.dp == 1]
        axes = "dp × fsdp × cp × tp" if mesh.cp > 1 else "dp × fsdp × tp"
        raise UserError(
            f"{words}: not possible for model={architecture.name} on {devices} device{'s' * (devices != 1)} "
            f"({axes} = {devices}; tp divides {architecture.num_heads} query heads and "
            f"{_heads(architecture)} key/value heads); legal meshes: "
            + "; ".join(" ".join(sizes.overrides) for sizes in listed)
        )
    return max(fitting, key=lambda sizes: (sizes.tp, sizes.fsdp))


def legal_meshes(architecture: Architecture, devices: int, cp: int = 1) -> list[MeshSizes]:
    """Every mesh of `devices` devices for this model with `cp` of them on that axis, sorted by tp and then dp."""
    if cp < 1 or devices % cp:
        return []
    rest = devices // cp
    return [
        MeshSizes(dp, rest // tp // dp, tp, cp)
        for tp in architecture.legal_tp(rest)
        for dp in range(1, rest // tp + 1)
        if rest // tp % dp == 0
    ]


def row_splits(length: int, devices: int) -> list[int]:
    """Sizes of the axis cp worth trying for rows of `length` tokens, 1 first."""
    most = max(1, length // LEAST_TOKENS)
    return [cp for cp in range(1, min(most, devices) + 1) if devices % cp == 0]


def whole_rows_problems(cp: int, what: str) -> list[str]:
    """Problems of an axis cp for something that needs whole rows."""
    return [f"mesh.cp={cp}: {what}, which needs whole rows; set mesh.cp=1"] if cp > 1 else []


def _heads(architecture: Architecture) -> str:
    return " and ".join(map(str, dict.fromkeys((architecture.num_kv_heads, architecture.num_global_kv_heads))))
