"""Prompts on which merged and base model differ: which are chosen."""

import json
from types import SimpleNamespace

import numpy as np

from gemma4_tpu.assets import resolve
from gemma4_tpu.export.probe_prompts import from_answers, from_logits


def test_the_clearest_difference_of_each_prompt_is_chosen():
    tokens = np.array([[2, 10, 11, 12, 13, 14], [2, 20, 21, 22, 0, 0], [2, 30, 31, 32, 33, 0]])
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    base = np.zeros((15, 8))  # 6 + 4 + 5 real positions
    base[:, 1] = 1.0
    merged = base.copy()
    merged[0, 5] = 9.0  # too early: one token of context
    merged[3, 6] = 1.2  # prompt 0, after 4 tokens: clear by 0.2
    merged[4, 7] = 3.0  # after 5: the base's margin of 1 is the smaller one
    merged[9, 6] = 1.05  # prompt 1: by 0.05, which rounding could turn
    merged[13, 3] = 1.5  # prompt 2, after 4 tokens
    assert from_logits(tokens, mask, base, merged) == [
        {"tokens": [2, 10, 11, 12, 13], "merged": 7, "base": 1, "margin": 1.0},
        {"tokens": [2, 30, 31, 32], "merged": 3, "base": 1, "margin": 0.5},
    ]


def test_heldout_answers_serve_where_no_logits_were_compared(tmp_path):
    def row(update, prompt, answer):
        return json.dumps({"update": update, "prompt": prompt, "answer": answer})

    rows = [row(0, "module a;", " wire x;"), row(5, "module a;", " zebra"), row(9, "module a;", " wire y;")]
    rows += [row(0, "same", "yes"), row(9, "same", "yes")]
    (tmp_path / "heldout_samples.jsonl").write_text("\n".join(rows) + "\n")
    base = SimpleNamespace(tokenizer_folder=resolve("embedded:tiny"), token_places=SimpleNamespace(renamed={}))
    trained = SimpleNamespace(run=SimpleNamespace(path=tmp_path), base=base, state=SimpleNamespace(update=9))
    (probe,) = from_answers(trained)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(resolve("embedded:tiny/tokenizer.json"))
    decode = tokenizer.decode
    assert decode(probe["tokens"] + [probe["merged"]]).startswith("module a; wire")
    assert probe["merged"] != probe["base"]
    answers = [decode(probe["tokens"] + [probe[key]]) for key in ("merged", "base")]
    assert "module a; wire y;".startswith(answers[0]) and "module a; wire x;".startswith(answers[1])
