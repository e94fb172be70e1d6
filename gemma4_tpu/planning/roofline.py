"""The least time that a program can take: its counts over the peaks of a chip. Imports no JAX."""

from __future__ import annotations

from gemma4_tpu.hardware import Slice
from gemma4_tpu.planning.links import link_bytes_per_second, sizes_of

PEAKS = ("compute", "hbm", "interconnect")


def roofline(
    wanted: Slice,
    flops: float,
    traffic: float,
    collectives: dict[str, dict[str, float]],
    link_bytes: dict[str, float] | None = None,
) -> dict[str, float]:
    """Seconds of one run at each peak: `compute`, `hbm`, `interconnect` and the largest, `update`.

    Args:
      wanted: the slice.
      flops: of one chip.
      traffic: HBM bytes of one chip.
      collectives: by kind, with the `bytes` that a chip sends.
      link_bytes: over each link of a collective, by direction (`Counts.link_bytes`). None, in old records: as if every
        collective had the links of the whole slice.
    """
    chip = wanted.chip.device
    if link_bytes is None:
        neighbours = sum(2 * (size - 1) / size for size in sizes_of(wanted))
        sent = sum(kind["bytes"] for kind in collectives.values())
        busiest = sent / neighbours if neighbours else 0.0
    else:
        busiest = max(link_bytes.values(), default=0.0)
    seconds = {
        "compute": flops / chip.peak_flops_per_second,
        "hbm": traffic / chip.hbm_bytes_per_second,
        "interconnect": busiest / link_bytes_per_second(wanted),
    }
    return {**seconds, "update": max(seconds.values())}
