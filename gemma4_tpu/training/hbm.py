"""Device memory, where the backend counts it (TPUs and GPUs do, CPUs don't)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KEYS = {"hbm_bytes": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
"""Key of a metric → JAX's name for it."""


def hbm(devices: Iterable[Any]) -> dict[str, int]:
    """`hbm_bytes` (now) and `hbm_peak_bytes` (since the start) of the fullest of this process's devices; empty where
    none is counted.
    """
    counted = [stats for device in devices if (stats := device.memory_stats())]
    return {key: max(stats.get(name, 0) for stats in counted) for key, name in KEYS.items() if counted}
