"""Slices without hardware: libtpu describes their devices and compiles for them on any Linux machine."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from gemma4_tpu.errors import UserError, first_line
from gemma4_tpu.hardware import Slice

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # nothing runs on an accelerator
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans can run at a time
    # Kernels name their source file: stripping the path makes programs identical wherever the package is, so that they
    # are found again (kept_programs.py).
    "JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX": "^.*/(?:site|dist)-packages/|^.*/(?=gemma4_tpu/)",
}
"""Environment of a process that compiles for TPUs without hardware; set before it imports JAX."""


def require_compiler() -> None:
    """Raises `UserError` if the TPU compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning compiles with libtpu, which is not installed: pip install 'gemma4-tpu[tpu]'")


def set_environment() -> None:
    """Sets `ENVIRONMENT`; call this before importing JAX."""
    os.environ.update(ENVIRONMENT)


def absent_devices(wanted: Slice) -> list[Any]:
    """The devices of a TPU slice, as the compiler sees them. JAX must run under `ENVIRONMENT`.

    Raises:
      UserError: libtpu is missing, or does not know this slice.
    """
    require_compiler()
    from jax.experimental import topologies

    if wanted.topology is None:
        raise UserError(f"{wanted.name}: the compiler plans for TPUs only")
    bounds = {"chips_per_host_bounds": [1, 1, 1]} if wanted.chips == 1 else {}
    try:
        described = topologies.get_topology_desc(wanted.topology, platform="tpu", **bounds)
    except Exception as error:  # libtpu raises its own exceptions
        reason = first_line(error)
        raise UserError(f"libtpu does not describe {wanted.name} ({wanted.topology}): {reason}") from error
    devices = list(described.devices)
    if len(devices) != wanted.devices:
        raise UserError(f"{wanted.name} is {wanted.devices} devices, but libtpu describes {len(devices)}")
    return devices
