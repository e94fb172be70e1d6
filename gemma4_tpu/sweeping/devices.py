"""Which devices each of several jobs at a time gets. Asks neither JAX nor a driver: the parent of a sweep has none."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from gemma4_tpu.config.schema import HardwareConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import slice_of

log = logging.getLogger(__name__)

_KEY = "hydra.launcher.parallel"
_TPU_FILES = (("/dev", "accel[0-9]*"), ("/dev/vfio", "[0-9]*"))
_GPU_FOLDER = Path("/proc/driver/nvidia/gpus")


def shares(parallel: int, hardware: Iterable[HardwareConfig]) -> list[dict[str, str]]:
    """The environment that each of `parallel` jobs at a time is given.

    Args:
      parallel: `hydra.launcher.parallel`.
      hardware: of every job.

    Raises:
      UserError: so many jobs would fight for an accelerator.
    """
    if parallel < 1:
        raise UserError(f"{_KEY}={parallel}: must be at least 1")
    if parallel == 1:
        return [{}]
    slices = {found.name: found for found in map(slice_of, hardware) if found}
    tpus = [name for name, found in slices.items() if found.chip.platform == "tpu"]
    if tpus or tpu_here():
        named = f"hardware={tpus[0].replace('-', '')}" if tpus else "this machine"
        raise UserError(f"{_KEY}={parallel}: {named} has a TPU, which one process at a time can hold; give {_KEY}=1")
    gpus = gpus_here()
    if not gpus:
        log.info("%d jobs at a time share this machine's %d CPU cores", parallel, os.cpu_count() or 1)
        return [{} for _ in range(parallel)]
    each = len(gpus) // parallel
    if each < 1:
        raise UserError(f"{_KEY}={parallel}: there are {len(gpus)} GPUs for them; give at most {_KEY}={len(gpus)}")
    for name, found in slices.items():
        if found.chips != each:
            raise UserError(
                f"{_KEY}={parallel}: hardware={name} takes {found.chips} GPUs, but each job would get {each} of"
                f" {len(gpus)}; give {_KEY}={max(1, len(gpus) // found.chips)}"
            )
    log.info("%d jobs at a time, %d of %d GPUs each", parallel, each, len(gpus))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(parallel)]


def tpu_here() -> bool:
    """Whether JAX would find a TPU: libtpu is installed, the device files are there, and nothing forbids it."""
    if not _allowed("tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    return any(any(Path(folder).glob(pattern)) for folder, pattern in _TPU_FILES)


def gpus_here() -> list[str]:
    """Names of the GPUs that a process may use, as `CUDA_VISIBLE_DEVICES` takes them."""
    if not _allowed("cuda", "gpu"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    return [str(i) for i in range(len(list(_GPU_FOLDER.iterdir())))] if _GPU_FOLDER.is_dir() else []


def _allowed(*platforms: str) -> bool:
    chosen = os.environ.get("JAX_PLATFORMS", "")
    return not chosen or bool(set(platforms) & set(chosen.split(",")))
