"""Decides whether an answer is the expected one: what is extracted from the text, how it is read, and the verdict.

`READINGS` is the only place for that. Imports neither JAX nor NumPy, because the checks list the readings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from gemma4_tpu.config.tasks import AnswersConfig
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.timeout import row_limit
from gemma4_tpu.evals.problems import LEAKED, Verdict, VerdictClass, is_leaked_thought

LETTER = "letter"
CHOOSE = (LETTER, "logprob", "logprob_per_token")
"""`eval.answers.choose`."""
ANSWERS = ("text", LETTER, "index")
"""`eval.answers.answer`."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"[-+−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,4}\b)?|\.\d+)")
_FENCE = re.compile(r"\s*```\w*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_LETTER = re.compile(r"\W*([A-Za-z])(?:\W*$|[.):\]*,])")
_SHOWN = 80  # characters of an answer in a verdict


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _number(text: str) -> Decimal:
    """The number in the text. Raises: ValueError: it contains no number, or several different ones."""
    found = {Decimal(number.replace(",", "").replace("−", "-")) for number in _NUMBER.findall(text)}
    if len(found) != 1:
        raise ValueError(f"contains {len(found) or 'no'} number{'s' * (len(found) > 1)}")
    return found.pop()


def _json(text: str) -> str:
    """The JSON value in canonical form: 1 equals 1.0, but not "1" or true. Raises: ValueError: the text is not JSON."""
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_int=Decimal, parse_float=Decimal)
        return json.dumps(value, sort_keys=True, default=lambda number: {"": str(number.normalize())})
    except (ValueError, RecursionError, ArithmeticError):
        raise ValueError("is not JSON") from None


READINGS: dict[str, Callable[[str], Any]] = {
    "exact": str,
    "stripped": str.strip,
    "casefold": _folded,
    "number": _number,
    "json": _json,
}
"""`eval.answers.compare` → a function from a text to the value compared; it raises ValueError if there is none."""


class Matcher:
    """Judges answers as configured in `eval.answers`."""

    def __init__(self, config: AnswersConfig):
        self._read = READINGS[config.compare]
        self._extract = re.compile(config.extract, re.MULTILINE) if config.extract else None

    def expected(self, text: str) -> Any:
        """The value that an answer must equal. Raises: ValueError: the text contains nothing to compare."""
        found = self._extracted(text)
        return self._read(text if found is None else found)

    def verdict(self, answer: str, expected: str) -> Verdict:
        """Judges a free answer."""
        found = self._found(answer)
        if isinstance(found, Verdict):
            return found
        try:
            read = self._read(found)
        except ValueError as error:
            return unanswered(found, str(error))
        return verdict(read == self.expected(expected), found, expected)

    def letter(self, answer: str, choices: Sequence[str], right: int) -> Verdict:
        """Judges a generated letter; the text of a choice is accepted too."""
        found = self._found(answer)
        if isinstance(found, Verdict):
            return found
        chosen = _chosen(found, choices)
        if chosen is None:
            return unanswered(found, "names no choice")
        return verdict(chosen == right, f"{LETTERS[chosen]}. {choices[chosen]}", f"{LETTERS[right]}. {choices[right]}")

    def _found(self, answer: str) -> str | Verdict:
        """The part of an answer that counts, or a verdict if there is none."""
        if is_leaked_thought(answer):
            return LEAKED
        if not answer.strip():
            return unanswered(answer, "is empty")
        try:
            with row_limit():
                found = self._extracted(answer)
        except RowDropped as slow:
            return unanswered(answer, f"eval.answers.extract took {slow.detail}")
        return unanswered(answer, "has no match of eval.answers.extract") if found is None else found

    def _extracted(self, text: str) -> str | None:
        """The last match of `extract`, or None; without `extract`, the whole text."""
        if self._extract is None:
            return text
        found = list(self._extract.finditer(text))
        if not found:
            return None
        return (found[-1][1] if self._extract.groups else found[-1][0]) or ""


def _chosen(text: str, choices: Sequence[str]) -> int | None:
    """The index of the choice that a text names by letter or by its text; None if none, or if ambiguous."""
    by_text = [number for number, choice in enumerate(choices) if _folded(choice) == _folded(text)]
    letter = _LETTER.match(text)
    number = LETTERS.index(letter[1].upper()) if letter else len(choices)
    if len(by_text) == 1:
        return by_text[0]
    return number if number < len(choices) else None


def verdict(passed: bool, said: str, expected: str) -> Verdict:
    """The verdict on a readable answer."""
    if passed:
        return Verdict(kind=VerdictClass.PASS, official=None)
    return Verdict(kind=VerdictClass.WRONG, official=None, detail=f"{_shown(said)}, expected {_shown(expected)}")


def unanswered(said: str, why: str) -> Verdict:
    """The verdict on an answer that contains nothing to compare."""
    return Verdict(kind=VerdictClass.UNANSWERED, official=None, detail=f"{_shown(said)} {why}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
