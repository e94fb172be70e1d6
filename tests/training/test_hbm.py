"""Device memory among the metrics, where the backend counts it."""

from dataclasses import dataclass

import jax

from gemma4_tpu.training.tally import hbm


@dataclass
class Chip:
    """A device as JAX shows those of TPUs and GPUs."""

    now: int
    peak: int

    def memory_stats(self):
        return {"bytes_in_use": self.now, "peak_bytes_in_use": self.peak, "bytes_limit": 100, "num_allocs": 3}


def test_the_fullest_chip_counts():
    assert hbm([Chip(5, 9), Chip(7, 8)]) == {"hbm_bytes": 7, "hbm_peak_bytes": 9}


def test_a_cpu_says_nothing():
    assert hbm(jax.local_devices()) == {}
