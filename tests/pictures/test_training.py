"""A run on pictures, from rows to a merged checkpoint that transformers loads: what it trains, and what it leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.pictures_smoke.make_data import make_data
from gemma4_tpu import Gemma4, api
from gemma4_tpu.config.lists import as_word
from gemma4_tpu.models.tensorfile import Checkpoint
from tests.cpu_compiler import flags
from tests.ports import free_port

SETTINGS = {
    "model": "tiny_e2b", "data": "chat_jsonl", "data.sequence_length": 128, "lora.rank": 2,
    "lora.modules_to_train": ["projector"], "optimizer.learning_rate": 1e-2, "optimizer.warmup_updates": 0,
    "trainer.global_batch_sequences": 2, "trainer.eval_every": 0, "trainer.sample_prompts": 1,
    "trainer.sample_tokens": 2, "trainer.max_updates": 4, "checkpoint.every": 2,
}  # fmt: skip
TOWER = ("model.vision_tower.", "model.embed_vision.")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A finished run of four updates on pictures, with a checkpoint after two."""
    folder = tmp_path_factory.mktemp("trained")
    make_data(folder / "data", train=16, heldout=4)
    words = SETTINGS | {
        "model.path": base, "data.train": folder / "data/train.jsonl", "data.heldout": folder / "data/heldout.jsonl",
        "data.image_cache": folder / "cache",
    }  # fmt: skip
    return api.train(words, {"run_dir": folder / "run"}), words, folder


def _losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["update"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_a_resumed_run_repeats_every_bit_and_makes_no_feature_twice(run, tmp_path):
    done, words, folder = run
    (cache,) = (folder / "cache").iterdir()
    made = {path: path.stat().st_mtime_ns for path in cache.iterdir() if path.name != "tower.json"}
    assert len(made) == 20
    again = tmp_path / "run"
    shutil.copytree(done.folder, again)
    shutil.rmtree(again / "checkpoints" / "4")
    api.train(words, {"run_dir": again})
    assert _losses(again) == _losses(done.folder)
    assert {path: path.stat().st_mtime_ns for path in made} == made


@pytest.mark.slow
def test_merged_and_peft_load_in_transformers_with_the_tower_as_it_was(run, base, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    done, *_ = run
    kinds = api.merge(f"run={done.folder}", {"export": "both", "export.target": tmp_path / "out"})
    targets = kinds.values["targets"]
    before, after = Checkpoint(str(base)), Checkpoint(targets["merged"])
    changed = {name for name in before.names() if not np.array_equal(before.read(name), after.read(name))}
    assert [name for name in changed if name.startswith(TOWER)] == ["model.embed_vision.embedding_projection.weight"]
    merged = AutoModelForImageTextToText.from_pretrained(targets["merged"], dtype=torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, targets["adapter"])
    ids = torch.arange(3, 40)[None]
    pixels = {"pixel_values": torch.rand(1, 630, 48), "image_position_ids": torch.stack(
        [torch.arange(630) % 24, torch.arange(630) // 24], -1)[None]}  # fmt: skip
    pixels = {name: value[:, :576] for name, value in pixels.items()}
    ids = torch.cat([torch.full((1, 64), merged.config.image_token_id), ids], 1)
    with torch.no_grad():
        ours, theirs = merged(ids, **pixels).logits, adapted(ids, **pixels).logits
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
def test_two_processes_share_the_pictures_and_learn_the_same(run, tmp_path):
    done, words, folder = run
    more = {
        "data.image_cache": tmp_path / "cache", "run_dir": tmp_path / "run", "mesh.fsdp": 2, "mesh.tp": 1,
        "trainer.max_updates": 2, "trainer.sample_prompts": 0, "distributed.num_processes": 2,
        "distributed.coordinator_address": f"localhost:{free_port()}",
    }  # fmt: skip
    command = [as_word(key, str(value) if isinstance(value, Path) else value) for key, value in (words | more).items()]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "gemma4_tpu.train", *command, f"distributed.process_id={index}"], text=True,
            env=os.environ | {"XLA_FLAGS": flags(devices=1)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) for index in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    alone, shared = (sorted(path.name for path in (where / "cache").glob("*/*")) for where in (folder, tmp_path))
    assert shared == alone
    assert 0 < int(re.search(r"features of pictures: (\d+) made", said[0])[1]) < len(alone) - 1  # beside tower.json
    # The same sums of float32 in another order: rounding errors of 2^-24, some hundred of them.
    several, one = _losses(tmp_path / "run"), _losses(done.folder)
    assert [several[update] for update in (1, 2)] == pytest.approx([one[update] for update in (1, 2)], rel=1e-5)


@pytest.mark.slow
def test_generate_answers_a_prompt_with_a_picture(run):
    done, _, folder = run
    model = Gemma4.load(done.folder)
    ask = {"type": "text", "text": "What is in the picture?"}
    prompts = [
        [{"role": "user", "content": [{"type": "image", "path": str(path)}, ask]}]
        for path in sorted((folder / "data/pictures").iterdir())[:2]
    ]
    both = model.generate(prompts, max_new_tokens=4)
    assert both == [model.generate([prompt], max_new_tokens=4)[0] for prompt in prompts]
