"""Distillation on the command line: killed and gone on with, on given rows, and teachers that can't be."""

import json
import os
import re
import shutil
import signal

import pytest

from gemma4_tpu.config.schema import ModelConfig, ObjectiveConfig
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.base import resolve_base
from gemma4_tpu.reporting.found import Records
from gemma4_tpu.reporting.on_policy import on_policy
from gemma4_tpu.rollouts.teacher import open_teacher
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.train import load_train
from tests.rollouts.test_runs import metrics
from tests.training.conftest import cache, shallow  # noqa: F401 (fixtures)
from tests.training.test_resume import last_state

SHORT = [
    "model.path=random:0", "objective.teacher=random:1", "objective.teacher_model=tiny", "data.max_rows=40",
    "lora.rank=4", "trainer.global_batch_sequences=8", "trainer.microbatches=4", "optimizer.learning_rate=2e-2",
    "optimizer.schedule=constant", "optimizer.warmup_updates=0", "checkpoint.every=2",
]  # fmt: skip
OWN = [
    "objective=distill", "rollouts.reward=tests.rollouts.noted:vowels", "rollouts.prompts=4", "rollouts.samples=2",
    "rollouts.new_tokens=16", "rollouts.slots=8", "rollouts.max_kl=null", "data.heldout=[]", "trainer.max_updates=4",
]  # fmt: skip


@pytest.mark.slow
def test_killed_while_answers_are_judged_it_ends_with_the_very_bits(shallow, tmp_path, monkeypatch):  # noqa: F811
    """The reward is told and not learnt from; without one there is none to be told."""
    whole, broken, alone = (tmp_path / name for name in ("whole", "broken", "alone"))
    shallow(*OWN, *SHORT, f"run_dir={whole}", cwd=tmp_path)
    record = json.loads((whole / "certificate.json").read_text())
    assert record["holds"] and record["updates"] == record["adapters"] == 4
    assert record["compared"]["updates"] == [1, 2] and record["max_loss_error"] < 1e-5
    losses = [row["loss"] for row in metrics(whole) if "loss" in row]

    monkeypatch.setenv("KILLED_AT", "20")  # of 8 in each update
    shallow(*OWN, *SHORT, f"run_dir={broken}", cwd=tmp_path, exit_code=-signal.SIGKILL)
    monkeypatch.delenv("KILLED_AT")
    shallow(*OWN, *SHORT, f"run_dir={broken}", cwd=tmp_path)
    assert metrics(broken) == metrics(whole)
    assert json.loads((broken / "certificate.json").read_text()) == record
    (_, expected), (_, found) = last_state(whole), last_state(broken)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name].tobytes() != expected[name].tobytes()]

    shallow(*OWN, *SHORT, "rollouts.reward=null", f"run_dir={alone}", cwd=tmp_path)
    assert [row["loss"] for row in metrics(alone) if "loss" in row] == losses
    assert "reward" not in metrics(alone)[-1] and not os.path.getsize(alone / "rollouts/000001.verdicts.jsonl")
    page = "\n".join(on_policy(Records(run=RunFolder(alone), name="run")))
    assert "It holds over 4 updates" in page and "reward" not in page


@pytest.mark.slow
def test_on_given_rows_held_out_divergence_falls_(shallow, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    words = ["objective=distill_offline", "data.heldout=[]", "data.heldout_fraction=0.2", f"run_dir={run}"]
    shallow(*SHORT, *words, "trainer.max_updates=8", cwd=tmp_path)
    heldout = [row["heldout_loss"] for row in metrics(run) if "heldout_loss" in row]
    assert heldout[-1] < heldout[0] - 0.01


def test_another_vocabulary_is_refused_by_its_tokens(tmp_path):
    objective = ObjectiveConfig(kind="distill", teacher="embedded:tiny", teacher_checkpoint="latest")
    student = resolve_base(ModelConfig(path="embedded:tiny"))
    taught = open_teacher(objective, student, load_tokenizer(student.tokenizer_folder)).model
    assert taught.arch == student.arch and not taught.lora.enabled

    other = tmp_path / "other"
    shutil.copytree(student.tokenizer_folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    said = rf"teacher=embedded:tiny: 2 of its tokens differ: \d+ is {re.escape(repr(first))}, here "
    with pytest.raises(UserError, match=said):
        open_teacher(objective, student, load_tokenizer(str(other)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", r"objective\.teacher: objective=distill needs a teacher; set a run folder or a checkpoint"),
        ("objective.teacher=http://host/v1", r"servers tell of a few tokens; give the checkpoint.*distill_offline"),
        ("objective.teacher=absent", r"objective\.teacher=absent: no such folder"),
        ("objective.teacher=random:0", r"random weights of which model\? Give objective\.teacher_model="),
        ("objective.teacher=embedded:tiny objective.teacher_checkpoint=last", "give best, latest or the number"),
        ("objective.teacher=embedded:tiny objective.divergence=both", "not a choice"),
    ],
)
def test_what_is_no_teacher_is_refused_at_once(words, said):
    with pytest.raises(UserError, match=said):
        load_train(["objective=distill", *words.split()])
    load_train(["objective=distill", "objective.teacher=embedded:tiny"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "objective.teacher=embedded:tiny data.image_cache=pictures",
            r"data\.image_cache=pictures: the teacher of objective=distill_offline reads text only; leave it out",
        ),
        (
            "objective.teacher=http://host/v1 objective.teacher_store=gs://bucket/told",
            r"objective\.teacher_store=gs://bucket/told: give a folder on this machine",
        ),
    ],
)
def test_given_rows_that_the_teacher_cannot_be_asked_about_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        load_train(["objective=distill_offline", *words.split()])
