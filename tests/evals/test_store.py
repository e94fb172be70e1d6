"""Samples on disk: torn lines, resumption, files from elsewhere."""

import json

import pytest

from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.store import Sample, Samples, read_foreign


def sample(number: int, problem: str = "p") -> Sample:
    return Sample(problem=problem, sample=number, completion=f"module {number}\n“ü”", tokens=3, seed=number)


def test_what_was_added_is_there_after_a_kill(tmp_path):
    path = tmp_path / "samples.jsonl"
    with Samples(path) as store:
        for number in range(3):
            store.add_sample(sample(number))
    text = path.read_text(encoding="utf-8")
    path.write_text(text + text.splitlines()[0][:25], encoding="utf-8")  # killed within a line
    with Samples(path) as store:
        assert store.samples == [sample(0), sample(1), sample(2)]
        store.add_sample(sample(3))
    with Samples(path) as store:
        assert [s.sample for s in store.samples] == [0, 1, 2, 3]


def test_the_first_of_two_rows_counts(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"problem": "p", "sample": 0, "completion": text} for text in ("first", "second")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Samples(path) as store:
        assert [s.completion for s in store.samples] == ["first"]


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"problem": "p"\n{"problem": "p", "sample": 0, "completion": ""}\n')
    with pytest.raises(UserError, match="line 1"):
        Samples(path)


def test_foreign_samples_are_numbered_as_they_come(tmp_path):
    path = tmp_path / "made.jsonl"
    rows = [("a", "1"), ("b", "2"), ("a", "3")]
    path.write_text("\n".join(json.dumps({"problem": p, "completion": c, "more": 1}) for p, c in rows) + "\n\n")
    found = read_foreign(str(path), ["a", "b"])
    assert [(s.problem, s.sample, s.completion) for s in found] == [("a", 0, "1"), ("b", 0, "2"), ("a", 1, "3")]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"problem": "zzz", "completion": ""}', "no problem 'zzz'"),
        ('{"problem": "a"}', "not {"),
        ("module x;", "not {"),
        ('{"problem": "a", "completion": null}', "not {"),
    ],
)
def test_a_foreign_line_that_cannot_be_judged_is_named(tmp_path, line, named):
    path = tmp_path / "made.jsonl"
    path.write_text(f'{{"problem": "a", "completion": ""}}\n{line}\n')
    with pytest.raises(UserError, match="line 2") as caught:
        read_foreign(str(path), ["a", "b"])
    assert named in str(caught.value)


SEPARATORS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \ud800"
"""Where `str.splitlines` would split, and half a surrogate pair, which UTF-8 can't hold."""


def test_lines_end_at_newlines_only(tmp_path):
    odd = Sample(problem="p", sample=0, completion=f"// {SEPARATORS}")
    with Samples(tmp_path / "samples.jsonl") as store:
        store.add_sample(odd)
    with Samples(tmp_path / "samples.jsonl") as store:
        assert store.samples == [odd]
    raw = f"// {SEPARATORS.removesuffix(chr(0xD800))}"  # as others write it, in JSON strings as it is where that may be
    row = json.dumps({"problem": "p", "completion": raw}, ensure_ascii=False)
    (tmp_path / "made.jsonl").write_text(f"\ufeff{row}\r\n{row}\n", encoding="utf-8")
    assert [s.completion for s in read_foreign(str(tmp_path / "made.jsonl"), ["p"])] == [raw, raw]


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "made.jsonl").write_text('{"problem": "p", "completion": "ü"}', encoding="utf-16")
    with pytest.raises(UserError, match="not UTF-8"):
        read_foreign(str(tmp_path / "made.jsonl"), ["p"])
