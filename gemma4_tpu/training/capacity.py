"""Checks that disk and host memory can hold the run, before the weights are loaded."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import psutil

from gemma4_tpu.config.outputs import CheckpointConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.layout import Leaf
from gemma4_tpu.storage import is_remote

_MIB = 2**20


def check_disk(checkpoints: str, config: CheckpointConfig, one: int) -> None:
    """Compares the checkpoints that the run will keep, plus one in progress, with the free space.

    Args:
      checkpoints: their folder, local or gs://.
      config: how many are kept.
      one: bytes of a checkpoint.

    Raises:
      UserError: they do not fit; gs:// is never full.
    """
    if is_remote(checkpoints):
        return
    wanted = one * (config.keep + config.keep_best + 1)
    there = sum(path.stat().st_size for path in Path(checkpoints).rglob("*") if path.is_file())
    free = shutil.disk_usage(checkpoints).free
    if wanted - there > free:
        raise UserError(
            f"checkpoint.keep={config.keep}: needs {_mib(wanted)} in {checkpoints} ({_mib(one)} each, one more while it"
            f" is saved{', and the best' if config.keep_best else ''}), but {_mib(free)} are free; free some space,"
            " lower checkpoint.keep, or use a run_dir on a larger disk"
        )


def check_memory(platform: str, base: Iterable[Leaf], state_bytes: int, value_bytes: int) -> None:
    """Compares the host memory that the run needs at least with what is free.

    On CPUs, that is the model and its training state; elsewhere, this process's part of the largest array, which passes
    through the host on its way to the devices.

    Args:
      platform: of the devices.
      base: the weights.
      state_bytes: of the training state.
      value_bytes: of one weight on the devices.

    Raises:
      UserError: it does not fit.
    """
    sizes = [value_bytes * math.prod(leaf.array_shape) for leaf in base]
    wanted = sum(sizes) + state_bytes if platform == "cpu" else max(sizes, default=0)
    free = psutil.virtual_memory().available
    if wanted > free:
        raise UserError(
            f"the model needs at least {_mib(wanted)} of this machine's memory, of which {_mib(free)} are free; use a"
            " smaller model, or a machine with more memory"
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:,.0f} MiB"
