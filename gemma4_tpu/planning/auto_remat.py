"""`trainer.remat=auto`: the policy that recomputes least and still fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from gemma4_tpu.config.limits import CHOICES
from gemma4_tpu.training.recipe import Recipe

if TYPE_CHECKING:
    from jax.sharding import Mesh

log = logging.getLogger(__name__)

AUTO = "auto"
NONE = "none"
POLICIES = tuple(policy for policy in CHOICES["trainer.remat"] if policy not in (AUTO, NONE))
"""From most memory to most arithmetic. `none` is excluded: `products` recomputes no matrix product either and moves
fewer bytes (31B on v5p-8: 0.64 TB of HBM traffic per update instead of 0.73), in a third of the memory.
"""
HEADROOM = 0.03
"""Share of HBM to leave free for other programs (evaluation, saving) and fragmentation."""

Result = TypeVar("Result")


def first_that_fits(
    attempt: Callable[[str], Result], memory: Callable[[Result], tuple[int | None, int | None]]
) -> Result:
    """Tries policies in order of increasing arithmetic, and returns the first result that leaves `HEADROOM`.

    If none does, returns the last one, which comes closest.

    Args:
      attempt: compiles with a policy.
      memory: (bytes needed, bytes available) of a result. Unknown values are None: unknown needs do not fit, unknown
        memory fits.
    """
    for policy in POLICIES:
        result = attempt(policy)
        needed, there = memory(result)
        if there is None or (needed is not None and needed <= (1 - HEADROOM) * there):
            log.info("remat=auto: %s fits (%s)", policy, _sizes(needed, there))
            break
        log.info("remat=auto: %s does not fit (%s)", policy, _sizes(needed, there))
    return result


def resolve_remat(recipe: Recipe, mesh: Mesh) -> Recipe:
    """The recipe with the policy that `remat=auto` selects on this mesh.

    Compiles for the devices of the mesh. The run itself compiles the selected policy again, from the compilation cache.
    If the memory is unknown (CPUs), nothing is compiled and nothing is recomputed.
    """
    if recipe.trainer.remat != AUTO:
        return recipe
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if mesh.devices.flat[0].platform == "cpu" or limit is None:
        log.info("remat=auto: %s (memory of this machine's devices is not known)", NONE)
        return _with(recipe, NONE)
    from gemma4_tpu.planning import compile as compiling
    from gemma4_tpu.planning.program import OutOfMemory, compile_lowered, peak_bytes

    def attempt(policy: str) -> tuple[Recipe, int | None]:
        tried = _with(recipe, policy)
        try:
            compiled = compile_lowered(compiling.lower_step(compiling.shapes(tried, mesh)))
        except OutOfMemory:
            return tried, None
        return tried, peak_bytes(compiled)

    chosen: Any = first_that_fits(attempt, lambda result: (result[1], limit))
    return chosen[0]


def _with(recipe: Recipe, policy: str) -> Recipe:
    return replace(recipe, trainer=replace(recipe.trainer, remat=policy))


def _sizes(needed: int | None, there: int | None) -> str:
    if there is None:
        return "memory not known"
    if needed is None:
        return f"out of {there / 2**30:.1f} GiB"
    return f"{needed / 2**30:.1f} of {there / 2**30:.1f} GiB per chip"
