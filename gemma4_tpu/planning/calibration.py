"""The factor from scheduled to measured time, and assumptions where the compiler gives no cycles. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass

from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import Slice
from gemma4_tpu.planning.links import link_bytes_per_second


@dataclass(frozen=True)
class Band:
    """Measured over scheduled time of steps that have been timed."""

    low: float
    high: float
    source: str


BAND = Band(
    1.22, 1.63,
    "the published recipe's step for 31B with LoRA on a v5p-8: 1.21 s measured; by its schedule 0.74 s at 3,072 tokens"
    " and 0.99 s at 4,096 (the paper names both lengths)",
)  # fmt: skip
"""The only published measurement of a LoRA step on a TPU that we know of."""

CLOCK_HERTZ = {"v5p": 1.75e9, "v5e": 1.5e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
"""Clock of the core whose cycles the compiler estimates. *Inferred*: the clock at which the published peak equals the
number of matrix units of 128 × 128 (v5e, v5p) or 256 × 256 (v6e, tpu7x) at two FLOPs per cell and cycle. A plain
product of 4096 × 5376 × 5376 then takes 1.03 times its time at peak on v5p and v5e, 1.13 on v6e, 1.26 on tpu7x.
"""
HBM_REACHED = 0.9
LINK_REACHED = 0.9
"""Share of the published bandwidth that copies and collectives reach. *Assumed*."""
KERNEL_REACHED = 0.5
"""Share of the peak at which an attention kernel processes the blocks that it visits. *Assumed*."""
SYNCHRONOUS_SECONDS, ASYNCHRONOUS_SECONDS, OTHER_SECONDS = 2e-6, 1e-6, 0.5e-6
"""Latency of a collective that the core waits for, of one that overlaps with it, and of another operation without
cycles. *Assumed*.
"""


@dataclass(frozen=True)
class ScheduleRates:
    """Speed at which a chip executes a schedule."""

    clock_hertz: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    """Of one link, in one direction."""
    kernel_flops_per_second: float

    @staticmethod
    def of(wanted: Slice) -> ScheduleRates:
        """The rates of each device of a slice.

        Raises:
          UserError: the clock of this chip is not known.
        """
        chip = wanted.chip.device
        if chip.name not in CLOCK_HERTZ:
            raise UserError(f"no clock is known for {chip.name}: plan.schedule=false leaves the schedule out")
        return ScheduleRates(
            CLOCK_HERTZ[chip.name],
            chip.hbm_bytes_per_second * HBM_REACHED,
            link_bytes_per_second(wanted) * LINK_REACHED,
            chip.peak_flops_per_second * KERNEL_REACHED,
        )
