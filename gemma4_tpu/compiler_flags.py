"""Compiler flags of a run: `hardware.flags`, a preset of its chip, and `hardware.compiler_options`. No JAX.

Planning and training take theirs from `compiler_options` alone. What each preset gains by the compiler's schedule:
`docs/planning.md`.
"""

from __future__ import annotations

from typing import Any

from gemma4_tpu.config.schema import HardwareConfig
from gemma4_tpu.hardware import slice_of

_REDUCE_SCATTER = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
    "xla_tpu_assign_all_reduce_scatter_layout": True,
}
"""Layouts with which an all-reduce of which each chip keeps a slice becomes a reduce-scatter."""
_ASYNCHRONOUS_GATHERS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
}
"""Gathers beside products; neither does anything alone."""
TUNED: dict[str, dict[str, Any]] = {
    "v5p": {**_REDUCE_SCATTER, **_ASYNCHRONOUS_GATHERS, "xla_tpu_scoped_vmem_limit_kib": 48 * 1024},
    "v6e": {**_REDUCE_SCATTER, **_ASYNCHRONOUS_GATHERS},
}
"""`hardware.flags=tuned` by chip. More on-chip memory than the default lets products take larger windows: it pays on
v5p, not on v6e."""


def compiler_options(hardware: HardwareConfig) -> dict[str, Any]:
    """The preset of the chip, if there is one and it is asked for, and over it what is given by name."""
    known = slice_of(hardware)
    preset = TUNED.get(known.chip.name, {}) if known is not None and hardware.flags == "tuned" else {}
    return {**preset, **hardware.compiler_options}
