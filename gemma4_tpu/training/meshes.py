"""Which meshes a model allows on a number of devices, and which of them a configuration means. No JAX here."""

from __future__ import annotations

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import MeshConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes


def resolve_mesh(mesh: MeshConfig, architecture: Architecture, devices: int) -> MeshSizes:
    """Sizes of the axes on `devices` devices.

    Raises:
      UserError: the sizes don't multiply to `devices`, or tp divides the heads unevenly; lists the legal meshes.
    """
    legal = legal_meshes(architecture, devices)
    sizes_given = {"dp": mesh.dp, "fsdp": mesh.fsdp, "tp": mesh.tp}
    given = {axis: size for axis, size in sizes_given.items() if size is not None}
    fitting = [sizes for sizes in legal if given.items() <= sizes._asdict().items()]
    if not fitting:
        words = ", ".join(f"mesh.{axis}={size}" for axis, size in given.items() if axis != "dp" or size > 1)
        listed = [sizes for sizes in legal if sizes.dp == mesh.dp] or [sizes for sizes in legal if sizes.dp == 1]
        raise UserError(
            f"{words}: not possible for model={architecture.name} on {devices} device{'s' * (devices != 1)} "
            f"(dp × fsdp × tp = {devices}; tp divides {architecture.num_heads} query heads and "
            f"{_heads(architecture)} key/value heads); legal meshes: "
            + "; ".join(" ".join(sizes.overrides) for sizes in listed)
        )
    return max(fitting, key=lambda sizes: (sizes.tp, sizes.fsdp))


def legal_meshes(architecture: Architecture, devices: int) -> list[MeshSizes]:
    """Every mesh of `devices` devices for this model, by tp and then dp."""
    return [
        MeshSizes(dp, devices // tp // dp, tp)
        for tp in architecture.legal_tp(devices)
        for dp in range(1, devices // tp + 1)
        if devices // tp % dp == 0
    ]


def _heads(architecture: Architecture) -> str:
    return " and ".join(map(str, dict.fromkeys((architecture.num_kv_heads, architecture.num_global_kv_heads))))
