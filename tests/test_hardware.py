"""The table of chips and slices: complete, consistent, and its prices sourced."""

import math

import pytest

from gemma4_tpu.config.schema import HardwareConfig
from gemma4_tpu.hardware import CHIPS, SLICES, chip_of, price_of, slice_of

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
        # v5p's name counts TensorCores, two per chip; v5e's and v6e's count chips.
        assert int(name.split("-")[1]) == entry.chips * (2 if generation == "v5p" else 1)
        assert entry.runtime_version
        assert entry.accelerator_type.endswith(f"-{name.split('-')[1]}")
    else:
        assert entry.topology is None


def test_prices_are_the_papers_or_say_what_they_derive_from():
    quoted = {name: SLICES[name].on_demand for name in ("v5p-8", "v6e-8", "h100x2")}
    assert [price.usd_per_hour for price in quoted.values()] == [16.80, 21.52, 22.12]
    assert not any("derived" in price.source for price in quoted.values())
    assert SLICES["v5p-32"].on_demand.usd_per_hour == 67.20
    assert SLICES["v6e-4"].on_demand.usd_per_hour == 10.76
    derived = [entry.on_demand for name, entry in SLICES.items() if name not in quoted and entry.on_demand]
    assert all(price.source.startswith("derived per chip from ") for price in derived)
    assert all(price.date for price in [*quoted.values(), *derived])


def test_the_papers_memory():
    assert SLICES["v5p-8"].hbm_bytes == 4 * 102_800_000_000
    assert SLICES["v6e-8"].hbm_bytes == 250 * GIB


def test_the_configured_price_comes_first():
    assert price_of(HardwareConfig(name="v5p-8")).usd_per_hour == 16.80
    assert price_of(HardwareConfig(name="v5p-8", usd_per_hour=5.0)).usd_per_hour == 5.0
    assert price_of(HardwareConfig(name="local", usd_per_hour=1.5)).usd_per_hour == 1.5
    assert price_of(HardwareConfig(name="local")) is None
    assert price_of(HardwareConfig(name="v5p-8", spot=True)) is None  # no spot price with a source is known


def test_chips_by_what_jax_calls_them():
    named = {
        ("tpu", "TPU v5p"): "v5p",
        ("tpu", "TPU v5"): "v5p",
        ("tpu", "TPU v5 lite"): "v5e",
        ("tpu", "TPU v5e"): "v5e",
        ("tpu", "TPU v6 lite"): "v6e",
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
