"""The table of chips and slices: complete, consistent, and named as Google names them."""

import math

import pytest

from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.hardware import CHIPS, SLICES, chip_of, slice_of

GIB = 2**30


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_consistent(name):
    entry = SLICES[name]
    assert entry.name == name
    assert entry.chips % entry.hosts == 0
    if entry.chip.platform == "tpu":
        generation, shape = entry.topology.split(":")
        assert generation == entry.chip.name
        assert math.prod(map(int, shape.split("x"))) == entry.chips
        # The names of v5p and tpu7x count TensorCores, two per chip; those of v5e and v6e count chips.
        assert int(name.split("-")[1]) == entry.chips * (2 if generation in ("v5p", "tpu7x") else 1)
        assert bool(entry.runtime_version) == (generation != "tpu7x")  # which is offered on GKE and Compute Engine only
        assert entry.accelerator_type.endswith(f"-{name.split('-')[1]}")
    else:
        assert entry.topology is None


def test_the_papers_memory():
    assert SLICES["v5p-8"].hbm_bytes == 4 * 102_800_000_000
    assert SLICES["v6e-8"].hbm_bytes == 250 * GIB


def test_chips_by_what_jax_calls_them():
    named = {
        ("tpu", "TPU v5p"): "v5p",
        ("tpu", "TPU v5"): "v5p",
        ("tpu", "TPU v5 lite"): "v5e",
        ("tpu", "TPU v5e"): "v5e",
        ("tpu", "TPU v6 lite"): "v6e",
        ("tpu", "TPU7x"): "tpu7x",
        ("gpu", "NVIDIA H100 80GB HBM3"): "h100",
        ("cuda", "NVIDIA H200"): "h200",
    }
    assert {device: chip_of(*device).name for device in named} == named
    assert chip_of("cpu", "cpu") is None
    assert chip_of("tpu", "TPU v4") is None
    assert set(named.values()) == set(CHIPS)


def test_local_is_no_slice():
    assert slice_of(HardwareConfig(name="local")) is None
    assert slice_of(HardwareConfig(name="v5e-16")).chips == 16


def test_a_slice_of_tpu7x_has_two_devices_per_chip():
    entry = SLICES["tpu7x-128"]
    assert (entry.chips, entry.devices, entry.hosts) == (64, 128, 16)
    device = entry.chip.device
    assert device.peak_flops_per_second * entry.devices == entry.peak_flops_per_second == 64 * 2307e12
    assert device.hbm_bytes == 94.75 * GIB  # what the compiler lets a program use
    assert SLICES["v5p-8"].chip.device is SLICES["v5p-8"].chip
