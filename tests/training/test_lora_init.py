"""Adapters that begin as a part of their weights, by the real command line."""

import shutil

import numpy as np
import pytest

from gemma4_tpu.tracking.metrics import read_metrics
from gemma4_tpu.training.began import FOLDER
from tests.training.conftest import HARD
from tests.training.test_resume import last_state

WORDS = [*HARD, "lora.init=pissa", "lora=qlora_int8", "lora.targets=[q,v]", "mesh.fsdp=2", "mesh.cp=2",
         "trainer.ema_decay=0.9", "optimizer.schedule=constant", "trainer.eval_every=1"]  # fmt: skip


@pytest.mark.slow
def test_resumed_it_ends_with_the_very_bits_and_needs_what_it_began_as(shallow, tmp_path):
    def train(updates, run, **more):
        return shallow(*WORDS, f"trainer.max_updates={updates}", f"run_dir={run}", cwd=tmp_path, devices=4, **more)

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(2, whole)
    train(1, halves)
    kept = shutil.move(halves / "checkpoints" / FOLDER, tmp_path / "kept")
    refused = train(2, halves, exit_code=2)
    assert "the initial adapters (lora.init) can't be read" in refused.stderr
    shutil.move(kept, halves / "checkpoints" / FOLDER)
    train(2, halves)
    (update, expected), (_, found) = last_state(whole), last_state(halves)
    assert update == 2 and found.keys() == expected.keys()
    assert not [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    losses = [[row.get("heldout_loss") for row in read_metrics(run / "metrics.jsonl")] for run in (whole, halves)]
    assert losses[0][:1] == losses[1][:1]
    plain = tmp_path / "plain"
    shallow(*WORDS, "lora.init=default", "lora.quantize=null", "trainer.max_updates=1", f"run_dir={plain}",
            cwd=tmp_path, devices=4)  # fmt: skip
    base = read_metrics(plain / "metrics.jsonl")[0]["heldout_loss"]
    # at first it is the base, but for the rounding of what was quantised: 1/254 of the largest value of a row
    np.testing.assert_allclose(losses[0][0], base, rtol=0.01)
