"""Rows as people have them to questions; rows that can't be asked are refused by their place."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from gemma4_tpu.config.tasks import AnswersConfig, EvalConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.accuracy.questions import load_questions


@pytest.fixture
def load(tmp_path):
    """Questions of rows, written as JSON lines."""

    def run(rows, **answers):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_questions(EvalConfig(problems_path=str(path), answers=AnswersConfig(**answers)))

    return run


def test_the_last_answer_of_a_row_is_expected_whatever_its_form(load, tmp_path):
    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "and 1 more?"), ("assistant", "3")]
    rows = [
        {"prompt": "1 + 1?", "completion": "2", "topic": "sums"},
        {"messages": [{"role": role, "content": content} for role, content in turns], "topic": "talks"},
        {"instruction": "Add.", "input": "1, 1", "output": "2", "topic": 7},
    ]
    found = load(rows, category="topic")
    assert [question.answer for question in found] == ["2", "3", "2"]
    assert [question.category for question in found] == ["sums", "talks", "7"]
    assert [turn["content"] for turn in found[1].messages] == ["1 + 1?", "2", "and 1 more?"]
    assert found[2].messages == ({"role": "user", "content": "Add.\n\n1, 1"},)
    assert len({question.name for question in found}) == 3

    (tmp_path / "rows.csv").write_text("question,gold\n1 + 1?,2\n")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["1 + 1?"], "gold": [2]}), tmp_path / "rows.parquet")
    columns = {"completion": "gold"}
    for name in ("rows.csv", "rows.parquet"):
        config = EvalConfig(problems_path=str(tmp_path / name), answers=AnswersConfig(columns=columns))
        (same,) = load_questions(config)
        assert (same.messages, same.answer, same.name) == (found[0].messages, "2", found[0].name)


def test_the_held_out_split_of_a_folder_is_asked(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split, "completion": "x"}))
    (only,) = load_questions(EvalConfig(problems_path=str(tmp_path)))
    assert only.messages[0]["content"] == "test"


ANIMALS = ["cat", "dog", "bird", "newt"]


@pytest.mark.parametrize(
    ("answers", "choices"),
    [(["C", "A"], ANIMALS), (["bird", "cat"], ANIMALS), ([2, 0], ANIMALS), (["2", "0"], json.dumps(ANIMALS)),
     (["w", "y"], {"text": ANIMALS, "label": ["y", "z", "w", "x"]}),
     (["3", "1"], {"text": ANIMALS, "label": ["1", "2", "3", "4"]})],
)  # fmt: skip
def test_answers_name_choices_by_letter_label_text_or_index(load, answers, choices):
    found = load(
        [{"question": "Which?", "choices": choices, "answer": answer} for answer in answers], choices="choices"
    )
    assert [question.answer for question in found] == ["bird", "cat"]
    assert [question.right for question in found] == [2, 0]
    assert found[0].messages[0]["content"].startswith("Which?\n\nA. cat\nB. dog\nC. bird\nD. newt\n\nAnswer with")
    assert found[0].scored == ()


def test_likelihoods_are_asked_without_the_choices_in_the_prompt(load):
    (one,) = load(
        [{"question": "Which?", "choices": ANIMALS, "answer": "dog"}], choices="choices", choose="logprob_per_token"
    )
    assert one.messages == ({"role": "user", "content": "Which?"},)
    assert one.scored == tuple(ANIMALS)


def test_what_could_mean_two_choices_is_refused_until_it_is_said_which(load):
    rows = [{"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": 1}]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*text and the index .*eval\.answers\.answer=text\|index"):
        load(rows, choices="choices")
    assert load(rows, choices="choices", answer="index")[0].answer == "2"
    with pytest.raises(UserError, match="its answer is 'newts', its choices are 'cat'"):
        load([{"question": "?", "choices": ANIMALS, "answer": "newts"}], choices="choices")


def test_rows_that_cannot_be_asked_are_named_and_refused(load):
    good = {"prompt": "1 + 1?", "completion": "2"}
    with pytest.raises(UserError, match=r"1 of 2 rows can't be used: .*rows\.jsonl:2: no_response"):
        load([good, {"prompt": "?", "completion": ""}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the expected answer 'two' contains no number"):
        load([good, {"prompt": "1 + 1?", "completion": "two"}], compare="number")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: ends with a user turn"):
        load([{"messages": [{"role": "user", "content": "?"}]}])
    with pytest.raises(UserError, match=r"has no category \(eval\.answers\.category=topic\)"):
        load([good], category="topic")
    with pytest.raises(UserError, match=r"eval\.answers\.columns="):
        load([{"a": "1 + 1?", "b": "2"}])
    with pytest.raises(UserError, match="choices has 1 choices"):
        load([{"question": "?", "choices": ["a"], "answer": "a"}], choices="choices")
    with pytest.raises(UserError, match="no rows"):
        load([])
