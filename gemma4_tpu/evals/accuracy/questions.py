"""Rows as questions: what comes before the last answer is asked, the last answer is expected.

Rows are read as training reads them (`data.normalise`). A row that can't be asked is refused with its place: a
benchmark without some of its rows would be another benchmark.
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
"""Tell the form of the rows, as in training."""
ASK_FOR_LETTER = "Answer with the letter of the right choice only."
_SHOWN = 3  # rows that a refusal names


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row."""

    name: str
    """Its number and a hash of what it asks and expects: rows of two evaluations are paired if both are the same."""
    messages: tuple[Message, ...]
    """What the model is asked; with letters, the choices too."""
    answer: str
    """The expected answer; with choices the text of the right one."""
    choices: tuple[str, ...] = ()
    right: int = 0
    """With choices: the number of the right one."""
    scored: tuple[str, ...] = ()
    """The choices, if their likelihoods decide."""
    category: str | None = None
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class _Row:
    """A row that was understood, before it is known what its answers are."""

    place: str
    messages: tuple[Message, ...]
    answer: str
    tools: tuple[Any, ...] | None
    category: str | None
    choices: tuple[str, ...]
    labels: tuple[str, ...]


class _Unfit(Exception):
    """Why a row can't be asked."""


def load_questions(config: EvalConfig) -> list[Question]:
    """The questions in `eval.problems_path`, in its order, or the first `max_problems` of them.

    Raises:
      UserError: there are none, or rows that can't be asked; names the first of them.
    """
    answers, path = config.answers, config.problems_path or ""
    place = find(DataSource(path=path), heldout=True)
    raw = itertools.islice(place.rows(), config.max_problems)
    first = list(itertools.islice(raw, FIRST_ROWS))
    read = _Reader(answers)
    read.begin(place.name, first)
    rows: list[_Row] = _each(((str(row.origin), row) for row in itertools.chain(first, raw)), read, path)
    if not rows:
        raise UserError(f"eval.problems_path={path}: holds no rows")
    for line in [*place.told(), *read.done.lines()]:
        log.info("%s", line)
    question = _Asking(answers, _reading(answers, rows, path) if answers.choices else None)
    return _each(((row.place, (number, row)) for number, row in enumerate(rows, 1)), question, path)


def _each(items: Iterable[tuple[str, Any]], make: Callable[[Any], Any], path: str) -> list[Any]:
    """What is made of each item; items come with their place.

    Raises:
      UserError: of some nothing can be made; tells how many, and of the first ones why.
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
            f"eval.problems_path={path}: {len(wrong)} of {len(wrong) + len(made)} rows can't be asked:"
            f" {'; '.join(wrong[:_SHOWN])}{more}. Mend them or leave them out"
        )
    return made


class _AnySize:
    """Counts no tokens of pictures: which model is asked, and how it sees, is not known yet."""

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def tokens(self, width: int, height: int) -> int:
        return 0


class _Reader:
    """Rows to what they ask and expect."""

    def __init__(self, answers: AnswersConfig):
        self.done = Normalised()
        with _our_keys():
            self._normaliser = Normaliser(
                answers.format, answers.columns, self.done, pictures=PictureReader(_AnySize()),
                read_elsewhere=(answers.category,) if answers.category else (),
            )  # fmt: skip
        self._answers = answers

    def begin(self, name: str, rows: Sequence[RawRow]) -> None:
        """Tells the form of the rows by the first ones."""
        with _our_keys():
            self._normaliser.begin(name, [self._without_choices(row) for row in rows])

    def __call__(self, row: RawRow) -> _Row:
        answers = self._answers
        try:
            if row.problem is not None:
                raise row.problem
            with row_limit():
                said = self._normaliser(self._without_choices(row))
        except RowDropped as dropped:
            raise _Unfit(f"{dropped} ({REASONS[dropped.reason]})") from None
        except Exception as error:  # a row of a kind that nobody thought of is named, too
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
        return _Row(str(row.origin), messages, answer, tools, category, choices, labels)

    def _without_choices(self, row: RawRow) -> RawRow:
        """A question beside choices could mean several things to the normaliser; here it is known what they are."""
        return row._replace(value={key: item for key, item in row.value.items() if key != self._answers.choices})


@contextmanager
def _our_keys() -> Iterator[None]:
    """The normaliser's refusals name the keys of `data=`, which are called otherwise here."""
    try:
        yield
    except UserError as refusal:
        told = str(refusal).replace("data.columns", "eval.answers.columns")
        told = told.replace("data.format", "eval.answers.format")
        raise UserError(f"{told}; a column of choices is named by eval.answers.choices=<column>") from None


def _asked(said: Conversation) -> tuple[tuple[Message, ...], str]:
    """(the conversation before the last answer, that answer)."""
    if not said.messages:
        raise _Unfit("plain text asks nothing")
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
        raise _Unfit(f"{column} has {len(texts)} choices; 2 to {len(LETTERS)} can be chosen from")
    if len({*texts}) < len(texts) or not all(text.strip() for text in texts) or len(labels) not in (0, len(texts)):
        raise _Unfit(f"{column} holds the same choice twice, an empty one, or not a label for each")
    return texts, labels


def _by_letter(row: _Row) -> int | None:
    names = row.labels or tuple(LETTERS[: len(row.choices)])
    return names.index(row.answer.strip()) if row.answer.strip() in names else None


def _by_index(row: _Row) -> int | None:
    text = row.answer.strip()
    if row.labels:  # which are what answers name then, be they numbers
        return None
    return int(text) if text.isdecimal() and len(text) < 3 and int(text) < len(row.choices) else None


def _by_text(row: _Row) -> int | None:
    found = [number for number, choice in enumerate(row.choices) if choice.strip() == row.answer.strip()]
    return found[0] if len(found) == 1 else None


_SAYS = dict(zip(ANSWERS, (_by_text, _by_letter, _by_index), strict=True))
"""`eval.answers.answer` → the number of the choice that a row's answer says; None: none."""


def _reading(answers: AnswersConfig, rows: Sequence[_Row], path: str) -> Callable[[_Row], int | None]:
    """How expected answers name a choice: as `eval.answers.answer` says, or the one way that fits every row.

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
            f"eval.problems_path={path}: the answers of {known[closest]} of {len(rows)} rows are the {closest} of a"
            f" choice, and no other reading fits more; {row.place} says {row.answer[:60]!r}, its choices are"
            f" {', '.join(map(repr, row.choices))[:200]}"
        )
    for row, *numbers in zip(rows, *fitting.values(), strict=True):
        if len({*numbers}) > 1:
            raise UserError(
                f"{row.place}: the answer {row.answer!r} is the {' and the '.join(fitting)} of different choices; say"
                f" which is meant: eval.answers.answer={'|'.join(fitting)}"
            )
    return _SAYS[next(iter(fitting))]


class _Asking:
    """Rows that were understood to questions; takes (number, row)."""

    def __init__(self, answers: AnswersConfig, reading: Callable[[_Row], int | None] | None):
        self._answers, self._reading, self._matcher = answers, reading, Matcher(answers)

    def __call__(self, numbered: tuple[int, _Row]) -> Question:
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
    """The conversation, its last turn with the choices listed under it; of parts, a text part more."""
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    text = f"\n\n{listed}\n\n{ASK_FOR_LETTER}"
    *before, last = messages
    content = last["content"]
    content = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return *before, {**last, "content": content}
