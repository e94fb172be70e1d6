"""Curves from metrics.jsonl."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from gemma4_tpu.reporting.curves import plot_run
from gemma4_tpu.tracking.metrics import MetricsFile
from gemma4_tpu.tracking.run import RunFolder


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.open("unused", "t", str(tmp_path / "run"), "auto", config={"name": "t"})
    yield folder
    folder.close()


@pytest.mark.parametrize("updates", [1, 100])
def test_both_curves_are_drawn(run, updates):
    metrics = MetricsFile(run.metrics_path)
    metrics.log({"heldout_loss": 5.0}, 0)
    for update in range(1, updates + 1):
        metrics.log({"loss": 1 + 4 / update, "real_tokens_per_second": 1e4}, update)
    metrics.log({"heldout_loss": 1.1}, updates)
    paths = plot_run(run)
    assert paths == [run.plots / "loss.png", run.plots / "throughput.png"]
    for path in paths:
        image = imread(path)[..., :3]
        assert image.shape == (600, 1050, 3)
        assert image[0, 0].tolist() == [1.0, 1.0, 1.0]
        blue = (image[..., 2] > image[..., 0] + 0.3).sum()  # the training curve
        assert blue > (0 if updates == 1 else 300)


def test_a_run_that_diverged_or_was_never_evaluated_is_drawn_as_far_as_it_goes(run):
    metrics = MetricsFile(run.metrics_path)
    for update, loss in enumerate([2.0, np.float32(1.5), math.inf, math.nan], start=1):
        metrics.log({"loss": loss}, update)
    assert plot_run(run) == [run.plots / "loss.png"]


def test_nothing_logged_nothing_drawn(run):
    assert plot_run(run) == []
