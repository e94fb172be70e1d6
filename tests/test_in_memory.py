"""`Gemma4` and the commands as functions say what transformers and the command line say."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma4_tpu import Gemma4, api, assets
from gemma4_tpu.config.machines import MeshConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.result import Result

TINY = assets.resolve("embedded:tiny")
TEXTS = ["module adder(input a, b, output y);", "A flip-flop", "assign y = a & b;"]


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, trust_remote_code=False).eval()


@pytest.fixture(scope="module")
def ours():
    return Gemma4.load("embedded:tiny")


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=4, tp=2), MeshConfig(dp=8, fsdp=1, tp=1)])
def test_logits_and_hidden_states_are_those_of_transformers(theirs, mesh):
    model = Gemma4.load(TINY, mesh=mesh)
    for text, scores, hidden in zip(TEXTS, model.logits(TEXTS), model.embed(TEXTS), strict=True):
        ids = model.token_ids(text)
        assert ids == AutoTokenizer.from_pretrained(TINY, trust_remote_code=False)(text)["input_ids"]
        with torch.inference_mode():
            found = theirs(torch.tensor([ids]), output_hidden_states=True)
        # float32 on both sides: rounding of sums over at most a thousand terms of the order of 10
        np.testing.assert_allclose(scores, found.logits[0].numpy(), atol=2e-4)
        np.testing.assert_allclose(hidden, found.hidden_states[-1][0].numpy(), atol=2e-4)


def test_one_text_and_ids_are_taken_as_well(ours):
    (alone,) = ours.logits(TEXTS[0])
    (by_ids,) = ours.logits(ours.token_ids(TEXTS[0]))
    np.testing.assert_array_equal(alone, by_ids)


def test_without_a_temperature_the_likeliest_tokens_answer_the_rendered_prompt(ours, theirs):
    asked = [{"role": "user", "content": "Write an adder."}]
    ids = ours.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    given = torch.tensor([ids])
    with torch.inference_mode():
        wanted = theirs.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12)[0]
    told = ours.tokenizer.decode(wanted[len(ids) :], skip_special_tokens=True)
    assert ours.generate(asked[0]["content"], max_new_tokens=12) == ours.generate([asked], max_new_tokens=12) == [told]


def test_answers_follow_from_seed_and_place(ours):
    asked = ["Write an adder.", [{"role": "user", "content": "Write a counter."}]]
    sampled = ours.generate(asked, max_new_tokens=12, temperature=1.0, seed=3)
    assert sampled == ours.generate(asked, max_new_tokens=12, temperature=1.0, seed=3, batch_size=1)
    assert sampled != ours.generate(asked, max_new_tokens=12, temperature=1.0, seed=4)
    assert len(ours.generate("Write an adder.", max_new_tokens=4)) == 1


def test_what_is_nothing_of_the_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither a checkpoint \(no config.json\) nor a run folder"):
        Gemma4.load(tmp_path)
    with pytest.raises(UserError, match="no such architecture"):
        Gemma4.load("random:0")


@pytest.mark.slow
def test_a_training_and_its_merge_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(40)]
    (tmp_path / "rows of mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trained = api.train(
        "data=chat_jsonl", "trainer.max_updates=3",
        {"data.train": [{"path": tmp_path / "rows of mine.jsonl"}], "data.sequence_length": 128, "lora.rank": 4},
    )  # fmt: skip
    assert trained.exit_code == 0 and trained.values["updates"] == 3
    assert trained.values["lora_parameters"] == Result.read(trained.folder / "result.json").lora_parameters
    merged = Gemma4.load(api.merge(f"run={trained.folder}").values["targets"]["merged"])
    tuned, base = Gemma4.load(trained.folder), Gemma4.load(trained.folder, adapters=False)
    as_tuned, as_base, as_merged = (model.logits("Say 3.")[0] for model in (tuned, base, merged))
    # a merged model is the tuned one, up to its rounding to the checkpoint's bfloat16
    assert np.linalg.norm(as_merged - as_tuned) < np.linalg.norm(as_base - as_tuned) / 4
    with pytest.raises(UserError, match=r"lora\.rank=0"):
        api.train({"lora.rank": 0})
