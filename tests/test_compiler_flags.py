"""Compiler flags: presets by chip, and what is given over them."""

import pytest

from gemma4_tpu.compiler_flags import TUNED, compiler_options
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.hardware import CHIPS


def test_a_preset_is_that_of_the_chip_and_what_is_given_goes_over_it():
    name, value = next(iter(TUNED["v5p"].items()))
    tuned = HardwareConfig(name="v5p-32", flags="tuned", compiler_options={name: not value, "xla_tpu_x": 1})
    assert compiler_options(tuned) == {**TUNED["v5p"], name: not value, "xla_tpu_x": 1}
    assert compiler_options(HardwareConfig(name="v5p-32", flags="none")) == {}


@pytest.mark.parametrize("name", ["local", "h100x2"])
def test_only_tpus_have_presets(name):
    assert compiler_options(HardwareConfig(name=name)) == {}


def test_presets_are_of_chips_that_we_know():
    assert set(TUNED) <= set(CHIPS)
