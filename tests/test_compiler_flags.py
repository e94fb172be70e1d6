"""Compiler flags: presets by chip, and what is given over them."""

import pytest

from gemma4_tpu.compiler_flags import TUNED, compiler_options, flags_problem
from gemma4_tpu.config.schema import HardwareConfig
from gemma4_tpu.hardware import CHIPS


def test_a_preset_is_that_of_the_chip_and_what_is_given_goes_over_it():
    name, value = next(iter(TUNED["v5p"].items()))
    tuned = HardwareConfig(name="v5p-32", flags="tuned", compiler_options={name: not value, "xla_tpu_x": 1})
    assert compiler_options(tuned) == {**TUNED["v5p"], name: not value, "xla_tpu_x": 1}
    assert compiler_options(HardwareConfig(name="v5p-32")) == {}


@pytest.mark.parametrize("name", ["v6e-4", "local"])
def test_a_preset_that_there_is_not_is_refused(name):
    (message,) = flags_problem(HardwareConfig(name=name, flags="tuned"))
    assert name in message and "v5p" in message and "hardware.flags=none" in message
    assert not flags_problem(HardwareConfig(name=name))


def test_presets_are_of_chips_that_we_know():
    assert set(TUNED) <= set(CHIPS)
