"""Detects this machine's accelerators without JAX or a driver, either of which might take hold of them."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import entry_points
from pathlib import Path

_TPU_FILES = (("/dev", "accel[0-9]*"), ("/dev/vfio", "[0-9]*"))
_GPU_FOLDER = Path("/proc/driver/nvidia/gpus")


def tpu_here() -> bool:
    """Whether JAX would find a TPU: libtpu is installed, the device files exist, and nothing forbids it."""
    if not _allowed("tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    return any(any(Path(folder).glob(pattern)) for folder, pattern in _TPU_FILES)


def gpus_here() -> list[str]:
    """Names of the GPUs that a process can use, as in `CUDA_VISIBLE_DEVICES`."""
    if not _allowed("cuda", "gpu"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    return [str(i) for i in range(len(list(_GPU_FOLDER.iterdir())))] if _GPU_FOLDER.is_dir() else []


def only_cpus_here() -> bool:
    """Whether JAX would end up on the CPU: there is no TPU, and no JAX plugin for other devices is installed.

    JAX starts libtpu wherever it is installed, even if only for planning; libtpu then takes its time and warns about
    the missing TPU.
    """
    plugins = importlib.util.find_spec("jax_plugins") or entry_points(group="jax_plugins")  # where JAX looks for them
    return not tpu_here() and not plugins


def _allowed(*platforms: str) -> bool:
    chosen = os.environ.get("JAX_PLATFORMS", "")
    return not chosen or bool(set(platforms) & set(chosen.split(",")))
