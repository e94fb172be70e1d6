"""Rows as questions: the question is everything before the last answer, which is the expected one.

Rows are read as in training (`data.normalise`). An unusable row is refused with its location: without some of its rows,
a benchmark would be a different one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gemma4_tpu.config.schema import DataSource
from gemma4_tpu.config.tasks import AnswersConfig, EvalConfig
from gemma4_tpu.data.drops import REASONS, RowDropped, unreadable
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.normalise import Normalised, Normaliser
from gemma4_tpu.data.pictures import PictureReader
from gemma4_tpu.data.readers import RawRow
from gemma4_tpu.data.sources import find
from gemma4_tpu.data.timeout import row_limit
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.accuracy.matching import ANSWERS, LETTER, LETTERS, Matcher
from gemma4_tpu.evals.problems import Message

log = logging.getLogger(__name__)

FIRST_ROWS = 64
"""Number of rows that determine the format, as in training."""
ASK_FOR_LETTER = "Answer with the letter of the right choice only."
_SHOWN = 3  # rows listed in a refusal


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row as a question."""

    name: str
    """Its number and a hash of question and expected answer: rows of two evaluations are paired if both agree."""
    messages: tuple[Message, ...]
    """The prompt; with letters, it includes the choices."""
    answer: str
    """The expected answer; with choices, the text of the correct one."""
    choices: tuple[str, ...] = ()
    right: int = 0
    """With choices: the index of the correct one."""
    scored: tuple[str, ...] = ()
    """The choices, if their likelihoods decide."""
    category: str | None = None
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class _ParsedRow:
    """A parsed row, before the meaning of its answer is known."""

    place: str
    messages: tuple[Message, ...]
    answer: str
    tools: tuple[Any, ...] | None
    category: str | None
    choices: tuple[str, ...]
    labels: tuple[str, ...]


class _Unfit(Exception):
    """Why a row can't be used."""


def load_questions(config: EvalConfig) -> list[Question]:
    """The questions in `eval.problems_path`, in its order, or the first `max_problems` of them.

    Raises:
      UserError: there are none, or some are unusable; names the first of them.
    """
    answers, path = config.answers, config.problems_path or ""
    place = find(DataSource(path=path), heldout=True)
    raw = itertools.islice(place.rows(), config.max_problems)
    first = list(itertools.islice(raw, FIRST_ROWS))
    read = _RowParser(answers)
    read.begin(place.name, first)
    rows: list[_ParsedRow] = _each(((str(row.origin), row) for row in itertools.chain(first, raw)), read, path)
    if not rows:
        raise UserError(f"eval.problems_path={path}: contains no rows; give another file or folder")
    for line in [*place.told(), *read.done.lines()]:
        log.info("%s", line)
    question = _Questioner(answers, _reading(answers, rows, path) if answers.choices else None)
    return _each(((row.place, (number, row)) for number, row in enumerate(rows, 1)), question, path)


def _each(items: Iterable[tuple[str, Any]], make: Callable[[Any], Any], path: str) -> list[Any]:
    """Applies `make` to each item; items come with their location.

    Raises:
      UserError: `make` refused some; states how many, and why for the first ones.
    """
    made, wrong = [], []
    for place, item in items:
        try:
            made.append(make(item))
        except _Unfit as problem:
            wrong.append(f"{place}: {problem}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"eval.problems_path={path}: {len(wrong)} of {len(wrong) + len(made)} rows can't be used:"
            f" {'; '.join(wrong[:_SHOWN])}{more}. Fix or remove them"
        )
    return made


class _AnySize:
    """Counts no tokens for pictures, since the model, and with it its vision tower, is not known yet."""

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def tokens(self, width: int, height: int) -> int:
        return 0


class _RowParser:
    """Parses rows into question and expected answer."""

    def __init__(self, answers: AnswersConfig):
        self.done = Normalised()
        with _our_keys():
            self._normaliser = Normaliser(
                answers.format, answers.columns, self.done, pictures=PictureReader(_AnySize()),
                read_elsewhere=(answers.category,) if answers.category else (),
            )  # fmt: skip
        self._answers = answers

    def begin(self, name: str, rows: Sequence[RawRow]) -> None:
        """Determines the format of the rows from the first ones."""
        with _our_keys():
            self._normaliser.begin(name, [self._without_choices(row) for row in rows])

    def __call__(self, row: RawRow) -> _ParsedRow:
        answers = self._answers
        try:
            if row.problem is not None:
                raise row.problem
            with row_limit():
                said = self._normaliser(self._without_choices(row))
        except RowDropped as dropped:
            raise _Unfit(f"{dropped} ({REASONS[dropped.reason]})") from None
        except Exception as error:  # so that an unforeseen kind of row is named too
            raise _Unfit(str(unreadable(error))) from None
        assert isinstance(said, Conversation)  # the normaliser takes no other rows
        messages, answer = _asked(said)
        choices, labels = _choices(row.value, answers.choices) if answers.choices else ((), ())
        category = None
        if answers.category:
            if row.value.get(answers.category) is None:
                raise _Unfit(f"has no category (eval.answers.category={answers.category})")
            category = str(row.value[answers.category])
        tools = tuple(said.tools) if said.tools else None
        return _ParsedRow(str(row.origin), messages, answer, tools, category, choices, labels)

    def _without_choices(self, row: RawRow) -> RawRow:
        """The row without its columns for choices, which could make its format ambiguous to the normaliser."""
        return row._replace(value={key: item for key, item in row.value.items() if key != self._answers.choices})


@contextmanager
def _our_keys() -> Iterator[None]:
    """Renames the keys of `data=` in the normaliser's refusals to those of `eval.answers`."""
    try:
        yield
    except UserError as refusal:
        told = str(refusal).replace("data.columns", "eval.answers.columns")
        told = told.replace("data.format", "eval.answers.format")
        raise UserError(f"{told}; for a column of choices, give eval.answers.choices=<column>") from None


def _asked(said: Conversation) -> tuple[tuple[Message, ...], str]:
    """(the conversation before the last answer, that answer)."""
    if not said.messages:
        raise _Unfit("plain text contains no question")
    *before, last = said.messages
    if last["role"] != "assistant" or not before:
        raise _Unfit(f"ends with a {last['role']} turn: there is no expected answer")
    if last.get("tool_calls"):
        raise _Unfit("the expected answer calls a tool; only texts are compared")
    if not str(last["content"]).strip():
        raise _Unfit("the expected answer is empty")
    return tuple({key: value for key, value in turn.items() if key != "train"} for turn in before), last["content"]


def _choices(row: Mapping[str, Any], column: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(texts, their own labels, if any) of a row's choices."""
    given: Any = row.get(column)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise _Unfit(f"{column} is not a list of choices") from None
    labels: Any = ()
    if isinstance(given, Mapping):
        given, labels = given.get("text"), given.get("label") or ()
    if not isinstance(given, list) or not isinstance(labels, list | tuple):
        raise _Unfit(f"{column} is not a list of choices")
    texts, labels = tuple(map(str, given)), tuple(map(str, labels))
    if not 2 <= len(texts) <= len(LETTERS):
        raise _Unfit(f"{column} has {len(texts)} choices instead of 2 to {len(LETTERS)}")
    if len({*texts}) < len(texts) or not all(text.strip() for text in texts) or len(labels) not in (0, len(texts)):
        raise _Unfit(f"{column} has duplicate or empty choices, or not a label for each")
    return texts, labels


def _by_letter(row: _ParsedRow) -> int | None:
    names = row.labels or tuple(LETTERS[: len(row.choices)])
    return names.index(row.answer.strip()) if row.answer.strip() in names else None


def _by_index(row: _ParsedRow) -> int | None:
    text = row.answer.strip()
    if row.labels:  # then answers name labels, even numeric ones
        return None
    return int(text) if text.isdecimal() and len(text) < 3 and int(text) < len(row.choices) else None


def _by_text(row: _ParsedRow) -> int | None:
    found = [number for number, choice in enumerate(row.choices) if choice.strip() == row.answer.strip()]
    return found[0] if len(found) == 1 else None


_SAYS = dict(zip(ANSWERS, (_by_text, _by_letter, _by_index), strict=True))
"""`eval.answers.answer` → a function from a row to the index of the choice that its answer names, or None."""


def _reading(answers: AnswersConfig, rows: Sequence[_ParsedRow], path: str) -> Callable[[_ParsedRow], int | None]:
    """How expected answers name a choice: as set in `eval.answers.answer`, or the only way that fits every row.

    Raises:
      UserError: none fits, or several fit and name different choices.
    """
    if answers.answer:
        return _SAYS[answers.answer]
    found = {name: [say(row) for row in rows] for name, say in _SAYS.items()}
    fitting = {name: numbers for name, numbers in found.items() if None not in numbers}
    if not fitting:
        known = {name: sum(n is not None for n in numbers) for name, numbers in found.items()}
        closest = max(known, key=lambda name: known[name])
        row = rows[found[closest].index(None)]
        raise UserError(
            f"eval.problems_path={path}: the answers of only {known[closest]} of {len(rows)} rows are the {closest} of"
            f" a choice, and no other reading fits more; correct {row.place}: its answer is {row.answer[:60]!r}, its"
            f" choices are {', '.join(map(repr, row.choices))[:200]}"
        )
    for row, *numbers in zip(rows, *fitting.values(), strict=True):
        if len({*numbers}) > 1:
            raise UserError(
                f"{row.place}: the answer {row.answer!r} is the {' and the '.join(fitting)} of different choices; give"
                f" eval.answers.answer={'|'.join(fitting)}"
            )
    return _SAYS[next(iter(fitting))]


class _Questioner:
    """Turns parsed rows into questions; takes (number, row)."""

    def __init__(self, answers: AnswersConfig, reading: Callable[[_ParsedRow], int | None] | None):
        self._answers, self._reading, self._matcher = answers, reading, Matcher(answers)

    def __call__(self, numbered: tuple[int, _ParsedRow]) -> Question:
        number, row = numbered
        told = json.dumps([row.messages, row.answer, row.choices], sort_keys=True, ensure_ascii=False, default=str)
        name = f"{number}-{hashlib.sha256(told.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"
        plain = Question(
            name=name, messages=row.messages, answer=row.answer, category=row.category, tools=row.tools,
        )  # fmt: skip
        if self._reading is None:
            try:
                self._matcher.expected(row.answer)
            except ValueError as error:
                raise _Unfit(f"the expected answer {row.answer[:60]!r} {error} (eval.answers.compare)") from None
            return plain
        right = self._reading(row)
        if right is None:
            raise _Unfit(f"the expected answer {row.answer[:60]!r} is not the {self._answers.answer} of a choice")
        chosen = replace(plain, answer=row.choices[right], choices=row.choices, right=right)
        if self._answers.choose != LETTER:
            return replace(chosen, scored=row.choices)
        return replace(chosen, messages=with_choices(row.messages, row.choices))


def with_choices(messages: Sequence[Message], choices: Sequence[str]) -> tuple[Message, ...]:
    """The conversation with the choices listed under its last turn; in a turn of parts, as a further text part."""
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    text = f"\n\n{listed}\n\n{ASK_FOR_LETTER}"
    *before, last = messages
    content = last["content"]
    content = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return *before, {**last, "content": content}
