"""Converts rows in the usual forms to one normal form, and counts the changes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from gemma4_tpu.data.calls import Tell
from gemma4_tpu.data.drops import RowDropped, printable
from gemma4_tpu.data.forms import (
    AUTO,
    CHOSEN,
    CONVERSATIONS,
    FORMS,
    NAMES,
    PAIRS,
    REJECTED,
    TURN_COLUMNS,
    Columns,
    Conversation,
    Said,
    name_of,
)
from gemma4_tpu.data.pictures import COLUMNS as COLUMNS_OF_PICTURES
from gemma4_tpu.data.pictures import PictureReader, picture_parts
from gemma4_tpu.data.readers import RawRow
from gemma4_tpu.errors import UserError

VERSION = 3
"""Version of this conversion; part of the examples' fingerprint."""
NOTES_KEPT = 100  # distinct notes; rows that each have keys of their own would add notes without end
IDENTITY = re.compile(r"(?:^|_)(?:id|uuid|hash|index|idx)$", re.IGNORECASE)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that a row's text refers to; without them the text is not what somebody said."""
VERDICTS = ("label", "kto_tag", "weight", "train")
"""Columns in which a row says whether its answer may be learned (TRL's and LLaMA-Factory's unpaired preferences)."""
CHOICES = ("context", "choices", "options")
"""Columns that can belong to a question; their presence makes a plain question column ambiguous."""
COLUMNS = (*NAMES, CHOSEN, REJECTED, *TURN_COLUMNS, *COLUMNS_OF_PICTURES)
"""Names that `data.columns` accepts on our side."""
OBJECTIVES = {CONVERSATIONS: "sft", PAIRS: "dpo"}
"""Kind of rows → an objective that takes them, for messages."""


@dataclass
class Normalised:
    """Changes made to the rows of one set, counted in rows."""

    forms: Counter[str] = field(default_factory=Counter)
    """Form → number of rows read in it."""
    notes: Counter[str] = field(default_factory=Counter)
    """Change, in words → number of rows changed."""

    def add(self, form: str, notes: Iterable[str]) -> None:
        """Counts one row."""
        self.forms[form] += 1
        for note in map(printable, notes):
            self.notes[note if note in self.notes or len(self.notes) < NOTES_KEPT else "(more of this kind)"] += 1

    def lines(self) -> list[str]:
        """Lines for logs and the preview, most frequent first."""
        forms = ", ".join(f"{count} as {form}" for form, count in self.forms.most_common())
        return [f"rows read: {forms}"] * bool(forms) + [f"{note}: {n} rows" for note, n in self.notes.most_common()]

    def to_json(self) -> dict[str, Any]:
        """Contents for `data.json`."""
        return {"forms": dict(self.forms), "normalised": dict(self.notes.most_common())}


class Normaliser:
    """Converts the rows of one source by `data.format` and `data.columns`; `done` counts the changes.

    Columns that the caller reads itself (`read_elsewhere`) are not counted as unused.

    Raises:
      UserError: the format does not exist for this kind of `rows`, or no form has one of the columns.
    """

    def __init__(
        self, form: str, columns: Mapping[str, str], done: Normalised, rows: str = CONVERSATIONS,
        pictures: PictureReader | None = None, read_elsewhere: Collection[str] = (),
    ):  # fmt: skip
        there = (AUTO, *(name for name, one in FORMS.items() if one.rows == rows))
        if form not in there:
            raise UserError(f"data.format={form}: the forms of {rows} are {', '.join(there)}")
        if unknown := [name for name in columns if name not in COLUMNS]:
            swapped = {own: name for name, own in columns.items()}
            advice = f"; did you mean {{{unknown[0]}: …}} the other way round?" if set(swapped) <= set(COLUMNS) else ""
            raise UserError(
                f"data.columns: {unknown[0]} is not a column of any form{advice} (write {{<ours>: <yours>}}; ours are "
                f"{', '.join(COLUMNS)})"
            )
        self._form, self._rows = form, rows
        self._own = {own: name for name, own in columns.items() if name not in TURN_COLUMNS}
        self._turn_columns = {name: own for name, own in columns.items() if name in TURN_COLUMNS}
        self._pairs_are_codev = False
        self._done = done
        self._pictures, self._read_elsewhere = pictures, read_elsewhere

    def begin(self, name: str, rows: Iterable[RawRow]) -> None:
        """Inspects the first rows of the source `name` before any row is converted.

        Raises:
          UserError: none of them has a known form; the message gives overrides that would identify it.
        """
        read = [row for row in rows if row.problem is None]
        forms = {self.form_of(row) for row in read}
        if read and forms == {None}:
            raise UserError(printable(unknown_form(name, read[0].value, self._form, self._rows)))
        if self._form == AUTO:
            self._pairs_are_codev = any(_is_codev(row.value) for row in read)

    def form_of(self, row: RawRow) -> str | None:
        """The form of a row, judged by its keys; None if it matches none."""
        there = frozenset(self._own.get(key, key) for key, value in row.value.items() if value is not None)
        given = frozenset(row.value)
        form = recognised(there, self._form, self._rows) or recognised(given, self._form, self._rows)
        return "codev_r1" if form == "prompt_completion" and self._pairs_are_codev else form

    def __call__(self, row: RawRow) -> Said:
        """Converts a row to normal form.

        Raises:
          RowDropped: the row has no known form, or its contents cannot be understood.
        """
        form = self.form_of(row)
        if form is None:
            raise RowDropped("unknown_form", f"keys: {', '.join(map(str, row.value))}"[:120])
        notes: dict[str, None] = {}
        value = self._renamed(row.value, notes)
        if absent := [key for key, item in value.items() if _is_nan(item)]:
            notes.setdefault("NaN in place of absent columns removed")  # pandas writes NaN for missing values
            value = {key: item for key, item in value.items() if key not in absent}
        bad = [key for key in VERDICTS if _is_no(value.get(key))]
        if bad and self._rows == CONVERSATIONS and form != "text":  # a text's label is its class
            told = f"{bad[0]}: {str(value[bad[0]]).lower()} marks a bad answer; leave out the column if it does not"
            raise RowDropped("no_target", told)
        read = COLUMNS_OF_PICTURES if self._pictures else ()
        if media := [key for key in MEDIA if key not in read and value.get(key)]:
            raise RowDropped(
                "bad_content", f"column {media[0]}: {self._left_out}; leave it out of rows that make sense without"
            )
        if row.columnar:
            value = without_nulls(value, lambda note: notes.setdefault(note))
        columns = Columns(value)
        made = FORMS[form].make(columns, self._turn_columns, lambda note: notes.setdefault(note))
        column = next((name for name in read if value.get(name)), None)
        given = next(iter(columns.take([column] if column else []).values()), None)
        columns.take(name for name in read if not value.get(name))  # of rows that have no pictures
        made = made.each(lambda conversation: self._with_pictures(conversation, given, row, notes))
        for key in value.keys() - columns.used - set(self._read_elsewhere):
            notes.setdefault(f"column {key[:40]!r} not used")
        self._done.add(form, notes)
        return made

    def _renamed(self, row: Mapping[str, Any], notes: dict[str, None]) -> dict[str, Any]:
        """A row's columns under our names; what `data.columns` names takes the place of a column that has our name."""
        named = {self._own[key]: item for key, item in row.items() if key in self._own and item is not None}
        for key in row.keys() & named.keys() - self._own.keys():
            notes.setdefault(f"column {key[:40]!r} not used: data.columns names another")
        return {**{key: item for key, item in row.items() if key not in self._own and key not in named}, **named}

    @property
    def _left_out(self) -> str:
        others = " and pictures" if self._pictures else " (and pictures, with data.image_cache)"
        return f"only text{others} is trained on"

    def _with_pictures(
        self, conversation: Conversation, given: Any, row: RawRow, notes: dict[str, None]
    ) -> Conversation:
        if self._pictures is not None:
            return self._pictures.within(conversation, given, row.origin, lambda note: notes.setdefault(note))
        if any(picture_parts(conversation.messages)):
            raise RowDropped("bad_content", f"a picture: {self._left_out}")
        return conversation


def without_nulls(value: Any, tell: Tell, depth: int = 0) -> Any:
    """A value from a table without the nulls that stand for absent keys, at every depth; nulls in lists are kept."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None and not _is_nan(item)}
        if depth and len(kept) < len(value):
            tell("nulls in place of absent keys removed")
        return {key: without_nulls(item, tell, depth + 1) for key, item in kept.items()}
    if isinstance(value, list):
        return [without_nulls(item, tell, depth + 1) for item in value]
    return value


def _is_no(value: Any) -> bool:
    """Whether a verdict is false: as JSON, as a number, or as text (in CSV)."""
    return value.strip().lower() in ("false", "0") if isinstance(value, str) else value in (False, 0)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


@cache
def recognised(names: frozenset[str], wanted: str = AUTO, rows: str = CONVERSATIONS) -> str | None:
    """The form of `rows` with these columns, provided it is the wanted one; None if there is none."""
    for form, row in FORMS.items():
        if (
            row.rows != rows
            or wanted not in (form, AUTO)
            or any(name_of(column, names) is None for column in row.needs)
        ):
            continue
        if wanted == AUTO and form == "codev_r1":
            continue
        # Text next to other known columns (a single turn of a conversation, say), or a question next to its context, is
        # ambiguous.
        others = {*TURN_COLUMNS, "from", "value", *(name for n in NAMES if n != "text" for name in NAMES[n])}
        if wanted == AUTO and form == "text" and names & others:
            continue
        if wanted == AUTO and form == "prompt_completion" and not names.isdisjoint(CHOICES):
            continue
        return form
    return None


def _is_codev(row: Mapping[str, Any]) -> bool:
    """Whether an answer has CodeV-R1's markup around Verilog; its column names alone do not tell."""
    return any(isinstance(text, str) and "<answer>" in text and "endmodule" in text for text in row.values())


def _row_inside(value: Any) -> list[str]:
    """The keys of the first object in a list."""
    return list(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else []


def unknown_form(name: str, row: Mapping[str, Any], wanted: str, rows: str = CONVERSATIONS) -> str:
    """Explains why rows like `row` of the source `name` cannot be read, and which overrides would make them
    readable.
    """
    there = [key for key, value in row.items() if value is not None]
    for other, objective in OBJECTIVES.items():
        if other != rows and wanted == AUTO and (form := recognised(frozenset(there), AUTO, other)):
            return f"{name}: rows of the form {form} are {other}, but this run takes {rows}; use objective={objective}"
    if rows == PAIRS:
        guess = f"{{prompt: {name_of('prompt', there) or '…'}, {CHOSEN}: …, {REJECTED}: …}}"
        return (
            f"{name}: rows with the keys {', '.join(map(str, row)) or '(none)'} are not pairs: they need {CHOSEN} and "
            f"{REJECTED}, and a prompt unless both begin with it; say which column is which, such as "
            f"data.columns='{guess}'"
        )
    known = {name: column for column in NAMES for name in NAMES[column]}
    lists = [key for key in there if isinstance(row[key], list | dict) and key not in known]
    lists.sort(key=lambda key: not isinstance(row[key], list))  # turns are more often a list than an object
    if lists and (inside := _row_inside(row[lists[0]])) and (form := recognised(frozenset(inside))):
        return (
            f"{name}: the rows (of the form {form}) are inside of {lists[0]}; write that list alone into the file, or "
            "one of its objects per line"
        )
    # A column that already has a meaning is not a candidate for another, and ids are not text.
    texts = [key for key in there if isinstance(row[key], str) and key not in known and not IDENTITY.search(key)]
    prompt, completion = name_of("prompt", there), name_of("completion", there)
    if prompt and completion and (beside := [key for key in there if key in CHOICES[1:]]):
        return (
            f"{name}: rows have {beside[0]} as well as {prompt}: write both into the question, or drop the former with "
            "data.format=prompt_completion"
        )
    if "context" in there and prompt and completion:
        guess = f"{{instruction: {prompt}, input: context, output: {completion}}}"
    elif lists and not texts and not prompt:
        guess = f"{{messages: {lists[0]}}}"
    else:
        asked = [key for key in there if key in NAMES["prompt"]] + texts
        answered = [key for key in there if key in NAMES["completion"]] + [t for t in texts if t != asked[0]]
        prompt, completion = prompt or (asked or ["…"])[0], completion or (answered or ["…"])[0]
        guess = f"{{prompt: {prompt}, completion: {completion}}}" if len(there) > 1 else f"{{text: {prompt}}}"
    if speaker := {"role", "from"}.intersection(there):
        return (
            f"{name}: rows with the keys {', '.join(map(str, row))} are single turns (of one {min(speaker)}); write "
            'those of one conversation into one row, {"messages": [{"role": …, "content": …}, …]}'
        )
    needs = "; ".join(f"{form}: {', '.join(row.needs)}" for form, row in FORMS.items() if row.rows == rows)
    wanted = "" if wanted == AUTO else f" (data.format={wanted})"
    return (
        f"{name}: rows with the keys {', '.join(map(str, row)) or '(none)'} match no known form{wanted}; say which "
        f"column is which, such as data.columns='{guess}', or convert them ({needs})"
    )
