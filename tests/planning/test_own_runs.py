"""`plan.calibration`: a band from one's own runs."""

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import CHIPS
from gemma4_tpu.planning.own_runs import band_of_runs
from gemma4_tpu.tracking.result import Result


def left(folder, slice_name, low=None, high=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"hardware: {{name: {slice_name}}}")
    result = Result(status="finished", measured_over_predicted_low=low, measured_over_predicted_high=high)
    result.write(folder / "result.json")
    return folder


def test_the_band_spans_the_runs_on_that_chip(tmp_path):
    left(tmp_path / "a", "v5p-8", 1.1, 1.3)
    left(tmp_path / "b", "v5p-32", 1.21, 1.4)
    left(tmp_path / "c", "v6e-8", 3.0, 4.0)  # says nothing of v5p
    left(tmp_path / "d", "v5p-8")  # had no plan
    band = band_of_runs(tmp_path, CHIPS["v5p"])
    assert (band.low, band.high) == (pytest.approx(1.0), pytest.approx(1.54))
    assert "2 own run(s) on v5p" in band.source
    assert band_of_runs(tmp_path / "a", CHIPS["v5p"]).high == pytest.approx(1.43)


def test_runs_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"of 0 run\(s\) none has"):
        band_of_runs(tmp_path, CHIPS["v5p"])
    left(tmp_path / "c", "v6e-8", 3.0, 4.0)
    with pytest.raises(UserError, match=r"of 1 run\(s\) none has measured_over_predicted in result\.json on v5p"):
        band_of_runs(tmp_path, CHIPS["v5p"])
    (tmp_path / "c" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="damaged, or no training run"):
        band_of_runs(tmp_path, CHIPS["v5p"])
