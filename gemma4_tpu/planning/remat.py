"""`trainer.remat=auto`: the policy that computes least again and still fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from gemma4_tpu.config.limits import CHOICES

log = logging.getLogger(__name__)

AUTO = "auto"
POLICIES = tuple(policy for policy in CHOICES["trainer.remat"] if policy != AUTO)
"""From most memory to most arithmetic."""
HEADROOM = 0.03
"""Share of HBM to leave free: other programs (evaluation, saving) and fragmentation."""

Result = TypeVar("Result")


def first_that_fits(
    attempt: Callable[[str], Result], memory: Callable[[Result], tuple[int | None, int | None]]
) -> Result:
    """Tries policies from the least arithmetic on, and returns the first result that leaves `HEADROOM`.

    Where none does, the one that comes nearest to fitting is returned: the last.

    Args:
      attempt: compiles with a policy.
      memory: (bytes needed, bytes there) of a result; what is not known is None: needed None does not fit, there None
        fits.
    """
    for policy in POLICIES:
        result = attempt(policy)
        needed, there = memory(result)
        if there is None or (needed is not None and needed <= (1 - HEADROOM) * there):
            log.info("remat=auto: %s fits (%s)", policy, _sizes(needed, there))
            break
        log.info("remat=auto: %s does not fit (%s)", policy, _sizes(needed, there))
    return result


def _sizes(needed: int | None, there: int | None) -> str:
    if there is None:
        return "memory not known"
    if needed is None:
        return f"out of {there / 2**30:.1f} GiB"
    return f"{needed / 2**30:.1f} of {there / 2**30:.1f} GiB per chip"
