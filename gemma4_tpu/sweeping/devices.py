"""Divides this machine's devices among concurrent jobs. Uses neither JAX nor a driver, because a sweep's parent must
not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from gemma4_tpu.accelerators import gpus_here, tpu_here
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import slice_of

log = logging.getLogger(__name__)

_KEY = "hydra.launcher.parallel"


def shares(parallel: int, hardware: Iterable[HardwareConfig]) -> list[dict[str, str]]:
    """The environment of each of `parallel` concurrent jobs.

    Args:
      parallel: `hydra.launcher.parallel`.
      hardware: of every job.

    Raises:
      UserError: the jobs would compete for an accelerator.
    """
    if parallel < 1:
        raise UserError(f"{_KEY}={parallel}: must be at least 1")
    if parallel == 1:
        return [{}]
    slices = {found.name: found for found in map(slice_of, hardware) if found}
    tpus = [name for name, found in slices.items() if found.chip.platform == "tpu"]
    if tpus or tpu_here():
        named = f"hardware={tpus[0].replace('-', '')}" if tpus else "this machine"
        raise UserError(f"{_KEY}={parallel}: {named} has a TPU, which one process at a time can hold; set {_KEY}=1")
    gpus = gpus_here()
    if not gpus:
        log.info("%d concurrent jobs share this machine's %d CPU cores", parallel, os.cpu_count() or 1)
        return [{} for _ in range(parallel)]
    each = len(gpus) // parallel
    if each < 1:
        raise UserError(f"{_KEY}={parallel}: there are only {len(gpus)} GPUs for them; set at most {_KEY}={len(gpus)}")
    for name, found in slices.items():
        if found.chips != each:
            raise UserError(
                f"{_KEY}={parallel}: hardware={name} takes {found.chips} GPUs, but each job would get {each} of"
                f" {len(gpus)}; set {_KEY}={max(1, len(gpus) // found.chips)}"
            )
    log.info("%d concurrent jobs, %d of %d GPUs each", parallel, each, len(gpus))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} for i in range(parallel)]
