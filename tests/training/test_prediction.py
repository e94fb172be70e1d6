"""A plan's step time beside the measured one: which plan is the run's, and what is refused."""

import json
import os
from dataclasses import replace

import pytest

from gemma4_tpu.architectures import ARCHITECTURES
from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import MeshSizes
from gemma4_tpu.train import load_train
from gemma4_tpu.training.prediction import Prediction, predict
from gemma4_tpu.training.recipe import Recipe

PLAN = {
    "slice": "v5p-8", "model": "gemma4_31b", "trained": "lora r=64", "mesh": {"dp": 1, "fsdp": 1, "tp": 4},
    "remat": "decoder", "sequence_length": 4096, "rows_per_update": 2, "microbatches": 1, "step_seconds": 0.65,
}  # fmt: skip


def recipe(remat, *words):
    common = ["model=gemma4_31b", "model.path=random:0", "lora.rank=64", "data.sequence_length=4096"]
    root = load_train(["hardware=v5p8", *common, "trainer.global_batch_sequences=2", *words]).root
    return Recipe(
        arch=ARCHITECTURES["gemma4_31b"], hardware=root.hardware, lora=root.lora, optimizer=root.optimizer,
        trainer=replace(root.trainer, remat=remat), mesh=MeshSizes(1, 1, 4), rows=2, length=4096, updates=10,
    )  # fmt: skip


def left(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(PLAN | changes))
    return folder


def test_the_newest_plan_of_the_same_configuration_is_found(tmp_path):
    plans, run = tmp_path / "plans", tmp_path / "run"
    for age, (name, changes) in enumerate(
        [
            ("other", {"rows_per_update": 4}),
            ("new", {}),
            ("old", {"step_seconds": 9.9}),
            ("timeless", {"step_seconds": None}),
        ]
    ):
        path = left(plans / name, **changes) / "plan.json"
        os.utime(path, (1e9 - age, 1e9 - age))
    found = predict(recipe("decoder"), None, run, plans)
    assert found == Prediction(0.65, 4096, str(plans / "new" / "plan.json"))
    left(run, step_seconds=0.7)  # made with run_dir=<this run>
    assert predict(recipe("decoder"), None, run, plans).step_seconds == 0.7
    assert predict(recipe("none"), None, run, plans) is None


def test_nothing_is_predicted_without_a_slice(tmp_path):
    assert predict(replace(recipe("none"), hardware=HardwareConfig()), None, tmp_path, tmp_path) is None


def test_a_given_plan_must_be_the_runs(tmp_path):
    plan = left(tmp_path / "plan")
    assert predict(recipe("decoder"), str(plan), tmp_path, tmp_path).step_seconds == 0.65
    with pytest.raises(UserError, match=r"another configuration:\n  remat: planned decoder, this run has none"):
        predict(recipe("none"), str(plan), tmp_path, tmp_path)
    roofline = left(tmp_path / "roofline", step_seconds=None)
    with pytest.raises(UserError, match=r"no step_seconds; make it with plan\.schedule=true"):
        predict(recipe("decoder"), str(roofline / "plan.json"), tmp_path, tmp_path)
    (plan / "plan.json").write_text("{")
    with pytest.raises(UserError, match="not a readable plan"):
        predict(recipe("decoder"), str(plan), tmp_path, tmp_path)


def test_a_plan_that_is_not_there_is_refused_at_once():
    with pytest.raises(UserError, match=r"trainer\.plan=nowhere: there is no such folder or file"):
        recipe("none", "trainer.plan=nowhere")


def test_shorter_rows_take_less():
    assert Prediction(2.0, 4096, "").ratio(1.5, 2048) == 1.5
