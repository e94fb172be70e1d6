"""`make train`, then the command line of the merge: a folder that `AutoModelForCausalLM` loads and generates with."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from gemma4_tpu.config.load import load
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.trained import open_trained
from gemma4_tpu.merge import MERGE
from tests.cpu_compiler import flags
from tests.export.test_merge import lora_logits

PROMPT = "module adder(input [3:0] a, input [3:0] b, output [4:0] s);\n"
NEW_TOKENS = 24


@pytest.mark.slow
def test_a_training_merged_generates_the_lora_models_greedy_tokens(tmp_path):
    """The length is fixed, so that one compiled program serves every token; what lies behind a token is not seen."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path / "run"
    train = ["experiment=smoke", "optimizer.learning_rate=1e-2", "trainer.max_updates=6", f"run_dir={run}"]
    one_device = os.environ | {"XLA_FLAGS": flags(devices=1)}
    command = [sys.executable, "-m", "gemma4_tpu.train", *train]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=one_device)
    merge = [sys.executable, "-m", "gemma4_tpu.merge", f"run={run}", "checkpoint=best"]
    done = subprocess.run(merge, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"merged: {run}/merged"
    parity = json.loads(next(run.glob("merges/*/parity.json")).read_text())
    assert parity["passed"] and parity["logits"]["prompts"] == "text" and parity["logits"]["top1_agreement"] > 0.95

    model = AutoModelForCausalLM.from_pretrained(run / "merged", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    asked = tokenizer(PROMPT, return_tensors="pt")
    given = asked["input_ids"].shape[1]
    found = model.generate(**asked, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)[0].numpy()
    best = ExportConfig(checkpoint="best")
    # Teacher-forced on what transformers generated: at every place the LoRA model would have gone on with that token.
    ours = lora_logits(run, found[None, :-1].astype(np.int32), best)[0, given - 1 :].copy()
    stops = model.generation_config.eos_token_id
    ours[:, stops] = -np.inf  # as min_new_tokens does
    chosen = np.take_along_axis(ours, found[given:, None], axis=-1)[:, 0]
    # The merged weights are rounded to the base's dtype: they may choose otherwise only between tokens whose logits
    # that rounding can swap, twice the largest difference that the gate saw.
    assert (ours.max(-1) - chosen).max() <= 2 * parity["logits"]["max_abs_difference"]
    assert np.mean(ours.argmax(-1) == found[given:]) > 0.9
    assert jax.devices()[0].platform == "cpu" and open_trained(run, best).state.update in (2, 4, 6)


def test_the_tracker_of_the_run_is_told_where_its_merge_is(run_of, merge):
    run, base = run_of()
    with (run / "config.yaml").open("a") as config:
        config.write("tracker: {kind: jsonl, project: p}\n")
    merge(run)
    (file,) = run.glob("merges/*/tracker.jsonl")
    (told,) = [event for event in map(json.loads, file.read_text().splitlines()) if event["event"] == "artifact"]
    assert (told["kind"], told["place"], told["aliases"]) == ("merged", f"{run}/merged", ["update-3"])
    assert told["metadata"]["base"] == str(base) and told["metadata"]["parity"]["passed"]


def test_shorthands_stand_for_keys_of_the_export_group(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    words = [f"run={tmp_path}", "checkpoint=7", "verify=stream", "overwrite=true", "export=both"]
    export = load(words, MERGE).root.export
    assert (export.checkpoint, export.verify, export.overwrite, export.format) == ("7", "stream", True, "both")
    with pytest.raises(UserError, match=r"export\.checkpoint=newest: give best, latest or the number"):
        load([f"run={tmp_path}", "checkpoint=newest"], MERGE)
    with pytest.raises(UserError, match="trainer=default: no such key"):  # a group of another entry point
        load([f"run={tmp_path}", "trainer=default"], MERGE)


def test_help_and_refusals_come_at_once_without_jax(tmp_path):
    for argv, code in ((["--help"], 0), (["run=nowhere"], 2)):
        command = [sys.executable, "-X", "importtime", "-m", "gemma4_tpu.merge", *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == code and "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        assert not {line.rsplit("|", 1)[1].strip() for line in lines} & {"jax", "numpy", "transformers", "tensorstore"}
