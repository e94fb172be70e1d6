"""`experiments/calibration`: quoted figures agree with each other, and the table is what its results make."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from gemma4_tpu.config.load import load
from gemma4_tpu.plan import PLAN
from gemma4_tpu.planning.calibration import BAND

FOLDER = Path(__file__).parents[2] / "experiments" / "calibration"
SPEC = importlib.util.spec_from_file_location("calibrate", FOLDER / "calibrate.py")
calibrate = importlib.util.module_from_spec(SPEC)
sys.modules["calibrate"] = calibrate
SPEC.loader.exec_module(calibrate)
MEASURED = {one.id: one for one in calibrate.measurements()}
pytest.importorskip("libtpu", reason="libtpu, which planning needs, is not installed here")


@pytest.mark.parametrize("name", MEASURED)
def test_a_published_step_can_be_planned_as_it_was_run(name):
    one = MEASURED[name]
    loaded = load(one.words, PLAN)
    config, wanted = loaded.root, loaded.checked.slice
    assert wanted.chips == one.chips
    told = re.search(r"([\d,]+) tokens/s and chip", one.source)
    if told:  # the quoted rate and the quoted step time are one figure
        tokens = config.trainer.global_batch_sequences * config.data.sequence_length
        rate = float(told[1].replace(",", ""))
        assert tokens / one.chips / one.measured_seconds == pytest.approx(rate, rel=1e-3)


def test_the_table_is_what_the_results_make():
    assert calibrate.TABLE.read_text(encoding="utf-8") == "\n".join(calibrate.lines(list(MEASURED.values()))) + "\n"


def test_what_was_compiled_is_what_is_named():
    for one in MEASURED.values():
        if one.result.is_file():
            told = json.loads(one.result.read_text(encoding="utf-8"))
            config = load(one.words, PLAN).root
            assert (told["slice"], told["model"]) == (config.hardware.name, config.model.name)
            assert told["rows_per_update"] == config.trainer.global_batch_sequences
            assert told["sequence_length"] == config.data.sequence_length


def test_the_band_holds_what_was_compiled():
    for one in MEASURED.values():
        if one.result.is_file():
            ratio = calibrate.ratio(one, json.loads(one.result.read_text(encoding="utf-8")))
            assert (BAND.low <= ratio <= BAND.high) is not bool(one.outside), one.name
