"""When an answer is the expected one, and when there is nothing to compare."""

import pytest

from gemma4_tpu.config.tasks import AnswersConfig
from gemma4_tpu.evals.accuracy.matching import READINGS, Matcher

PASS, WRONG, UNANSWERED = "pass", "wrong", "unanswered"


def kind(answer, expected, **config):
    return str(Matcher(AnswersConfig(**config)).verdict(answer, expected).kind)


@pytest.mark.parametrize(
    ("compare", "answer", "expected", "verdict"),
    [
        ("exact", "cat", "cat", PASS),
        ("exact", "cat\n", "cat", WRONG),
        ("stripped", " cat\n", "cat", PASS),
        ("stripped", "Cat", "cat", WRONG),
        ("casefold", "The  CAT\n", "the cat", PASS),
        ("casefold", "STRASSE", "Straße", PASS),
        ("number", "The answer is 1,234.50 dollars.", "1234.5", PASS),
        ("number", "-3.5e2", "−350", PASS),
        ("number", "It is 7, I mean 7.0", "7", PASS),
        ("number", "7 or 8", "7", UNANSWERED),
        ("number", "none", "0", UNANSWERED),
        ("number", "12", "13", WRONG),
        ("json", '```json\n{"b": 1.0, "a": [true]}\n```', '{"a": [true], "b": 1}', PASS),
        ("json", '{"a": "1"}', '{"a": 1}', WRONG),
        ("json", '{"a": 1}', '{"a": true}', WRONG),
        ("json", "{a: 1}", '{"a": 1}', UNANSWERED),
        ("json", "[" * 100_000, "[]", UNANSWERED),
        ("stripped", "   ", "cat", UNANSWERED),
        ("stripped", "thought\nhm, cat", "cat", "leaked thought"),
    ],
)
def test_answers_are_compared_as_they_are_read(compare, answer, expected, verdict):
    assert kind(answer, expected, compare=compare) == verdict


def test_what_is_extracted_is_the_last_match_in_both_answers():
    """As GSM8K writes its answers: a chain of thought, then #### and a number."""
    gsm8k = {"compare": "number", "extract": r"####\s*(.*)"}
    assert kind("2 + 2 is 4\n#### 4\nno:\n#### 5", "so 3 + 2\n#### 5", **gsm8k) == PASS
    assert kind("it is 5", "so 3 + 2\n#### 5", **gsm8k) == UNANSWERED
    assert kind("#### 5", "5", **gsm8k) == PASS
    assert kind("it is <b>", "<b>", extract=r"<\w>") == PASS


def test_a_slow_pattern_ends():
    import gemma4_tpu.data.timeout as timeout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeout, "ROW_SECONDS", 0.2)
        assert kind("a" * 40 + "b", "x", extract=r"(a+)+$") == UNANSWERED


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("B", 1), ("b", 1), ("(C)", 2), ("**A**", 0), ("B. a dog", 1), ("A)", 0), ("a bird", 2), ("A Bird", 2),
        ("a cat and more", None), ("E", None), ("I'd say B", None), ("", None),
    ],
)  # fmt: skip
def test_a_letter_or_the_choice_itself_is_a_choice(answer, chosen):
    choices = ("a cat", "a dog", "a bird")
    verdicts = [str(Matcher(AnswersConfig()).letter(answer, choices, right).kind) for right in range(3)]
    assert verdicts == ([UNANSWERED] * 3 if chosen is None else [PASS if r == chosen else WRONG for r in range(3)])


def test_every_reading_is_told_in_the_report():
    from gemma4_tpu.evals.accuracy.matching import CHOOSE
    from gemma4_tpu.reporting.accuracy import CHOSEN_BY, READ_AS

    assert set(READ_AS) == set(READINGS) and set(CHOSEN_BY) == set(CHOOSE)
