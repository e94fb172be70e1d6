"""A tiny model learns from pictures what it could not know without: the experiment, shortened."""

import json
import math
from random import Random

import pytest

from experiments.pictures_smoke.make_data import COLOURS, draw
from experiments.pictures_smoke.run import SETTINGS, WHOLE
from gemma4_tpu import api

HELDOUT = 16


def _write(path, count, rng):
    """Rows of which each colour has as many; shapes and their number say nothing of it."""
    rows = []
    for number in range(count):
        colour = sorted(COLOURS)[number % len(COLOURS)]
        name = f"{path.stem}{number}.png"
        draw(rng.choice(("circle", "square")), colour, rng.randint(2, 4), rng).save(path.parent / name)
        ask = [{"type": "image", "path": name}, {"type": "text", "text": "Which colour?"}]
        rows.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": colour}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_it_names_colours_that_only_pictures_tell(base, tmp_path):
    rng = Random(0)
    _write(tmp_path / "train.jsonl", 480, rng)
    _write(tmp_path / "heldout.jsonl", HELDOUT, rng)
    done = api.train(
        SETTINGS | {
            "model": "tiny_e2b", "model.path": base, "data.train": tmp_path / "train.jsonl",
            "data.heldout": tmp_path / "heldout.jsonl", "data.image_cache": tmp_path / "cache",
            "data.sequence_length": 192, "lora.modules_to_train": [*WHOLE, "projector"], "trainer.max_updates": 60,
            "optimizer.warmup_updates": 5, "run_dir": tmp_path / "run",
        }
    )  # fmt: skip
    # Whatever a model says that does not see, over rows of which each colour has as many, its mean loss on a row is at
    # least the entropy of the colours (Gibbs): ln 4 nats, on average over the tokens of an answer with its turn's end.
    targets = json.loads((done.folder / "data.json").read_text())["heldout"]["target_tokens"]
    blind = math.log(len(COLOURS)) * HELDOUT / targets
    assert done.values["heldout_loss_last"] < 0.5 * blind < done.values["heldout_loss_first"]

    scored = api.evaluate(
        f"run={done.folder}",
        {"eval": "accuracy", "eval.problems_path": tmp_path / "heldout.jsonl", "eval.max_new_tokens": 8},
    )
    # Guessing gets 4 of 16 right; 12 or more with a probability of 4e-5.
    assert scored.values["classes"].get("pass", 0) >= 12, scored.values["classes"]
