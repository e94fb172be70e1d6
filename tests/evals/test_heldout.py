"""Held-out prompts answered while a run trains."""

import json

import pytest

from gemma4_tpu.train import main


@pytest.mark.slow
def test_answers_go_to_the_run_folder_at_each_evaluation(tmp_path):
    folder = tmp_path / "run"
    words = [
        "experiment=smoke", "data.max_rows=40", "mesh.fsdp=8", "trainer.max_updates=2",
        "trainer.global_batch_sequences=8", "trainer.eval_every=1", "trainer.sample_prompts=2",
        "trainer.sample_tokens=12", f"run_dir={folder}",
    ]  # fmt: skip
    assert main(words) == 0
    rows = [json.loads(line) for line in (folder / "heldout_samples.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 0, 1, 1, 2, 2]
    for row in rows:
        assert row["prompt"].startswith("<bos><|turn>user\n")
        assert row["prompt"].endswith("<|turn>model\n<|channel>thought\n<channel|>")
        assert row["reference"].startswith("```verilog\nmodule TopModule") and row["reference"].endswith("<turn|>")
        assert row["answer"] and row["finish"] in ("stop", "length")
    assert [row["prompt"] for row in rows[:2]] == [row["prompt"] for row in rows[4:]]
