"""Turns the rows of several sources into tokenised examples, and counts what is dropped."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from gemma4_tpu.config.schema import DataConfig, DataSource
from gemma4_tpu.data import codev
from gemma4_tpu.data.aside import Identity, identity
from gemma4_tpu.data.chat import ChatFormat, Example, Rendering
from gemma4_tpu.data.drops import DropReport, Origin, RowDropped, unreadable
from gemma4_tpu.data.forms import CONVERSATIONS, Conversation, Pair, Said
from gemma4_tpu.data.hard_limit import at, shown
from gemma4_tpu.data.normalise import Normalised, Normaliser
from gemma4_tpu.data.pictures import Picture, PictureReader
from gemma4_tpu.data.readers import RawRow
from gemma4_tpu.data.sources import SourcePlace
from gemma4_tpu.data.timeout import row_limit

logger = logging.getLogger(__name__)

FIRST_ROWS = 64  # rows of each source that determine its form
CHUNK_ROWS = 512  # rows encoded per call; enough to keep every core of the tokenizer busy
PROGRESS_SECONDS = 10.0


Keep = Callable[[list[Picture]], None]
"""Receives the pictures of examples while their bytes are in memory."""


def let_go(pictures: list[Picture]) -> None:
    """Keeps nothing; for callers that need only lengths."""


class TokenisedRow(NamedTuple):
    """One row on its way into the store."""

    examples: list[Example]
    source: int
    origin: Origin
    identity: Identity


class _Taken(NamedTuple):
    """A row that was understood."""

    source: int
    origin: Origin
    said: Said
    identity: Identity


class Tokeniser:
    """Normalises, renders and encodes the rows of sources. `report` and `digest` belong to the latest run."""

    def __init__(
        self, data: DataConfig, chat: ChatFormat, rows: str = CONVERSATIONS, pictures: PictureReader | None = None,
        keep: Keep = let_go,
    ):  # fmt: skip
        """Prepares to read rows.

        Args:
          data: form, lengths and policies.
          chat: renders conversations.
          rows: the kind of rows (`forms.py`).
          pictures: reads the pictures of rows; None drops rows that have any.
          keep: receives the pictures of each chunk.
        """
        self._data, self._rows = data, rows
        self._pictures, self._keep = pictures, keep
        self._chat = chat
        self._iverilog = codev.find_iverilog() if data.check_syntax and data.format == "codev_r1" else None
        self.normalised = Normalised()
        self.report = DropReport()
        self.digest = ""

    def run(
        self, name: str, sources: list[DataSource], places: list[SourcePlace], max_rows: int | None = None
    ) -> Iterator[TokenisedRow]:
        """Yields the rows of all sources; refuses too many drops at the end.

        With `max_rows`, each source contributes its first rows in proportion to its weight, as long as it has any.
        """
        self.report = DropReport()
        digest = hashlib.sha256()
        form, columns = self._data.format, self._data.columns
        normalisers = [Normaliser(form, columns, self.normalised, self._rows, self._pictures) for _ in places]
        each = [_begun(place, normaliser) for place, normaliser in zip(places, normalisers, strict=True)]
        rows = _in_turn(each) if max_rows is None else _by_weight(each, [s.weight for s in sources], max_rows)
        report_at = time.monotonic() + PROGRESS_SECONDS
        while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
            self.report.rows_read += len(chunk)
            taken = [self._take(number, row, normalisers[number], digest) for number, row in chunk]
            made = list(self._tokenise(self._that_compile([row for row in taken if row is not None])))
            if self._pictures is not None:  # before the bytes of these rows are released
                self._keep([picture for row in made for example in row.examples for picture in example.pictures])
                made = [row._replace(examples=list(map(_without_bytes, row.examples))) for row in made]
            yield from made
            if time.monotonic() > report_at:
                logger.info("%s: %d rows read, %d dropped", name, self.report.rows_read, self.report.rows_dropped)
                report_at = time.monotonic() + PROGRESS_SECONDS
        self.digest = digest.hexdigest()
        for line in self.report.lines():
            logger.warning("%s: dropped %s", name, line)
        self.report.check(name, self._data.max_drop_fraction)

    def _take(self, number: int, row: RawRow, normaliser: Normaliser, digest: Any) -> _Taken | None:
        """The content of a row, added to the digest of all rows; None if the row is dropped."""
        problem = row.problem
        try:
            if problem is None:
                # Identifies a row's content, whatever the file format it came in.
                content = json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=_in_words)
                digest.update(content.encode("utf-8", "surrogatepass"))
                with row_limit():
                    made = normaliser(row)
                return _Taken(number, row.origin, made, identity(made))
            digest.update(str(problem).encode())
        except RowDropped as dropped:
            problem = dropped
        except UnicodeEncodeError as error:  # half of a surrogate pair, from JSON within JSON
            problem = RowDropped("invalid_utf8", error.reason)
        except Exception as error:  # an unforeseen kind of row must not stop the run
            problem = unreadable(error)
        self.report.drop(problem, row.origin)
        return None

    def _that_compile(self, taken: list[_Taken]) -> list[_Taken]:
        """The rows whose code compiles, if `data.check_syntax` asks for it."""
        if not self._iverilog:
            return taken
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each thread waits for a process
            problems = list(pool.map(self._syntax_problem, taken))
        for row, problem in zip(taken, problems, strict=True):
            if problem is not None:
                self.report.drop(problem, row.origin)
        return [row for row, problem in zip(taken, problems, strict=True) if problem is None]

    def _syntax_problem(self, row: _Taken) -> RowDropped | None:
        try:
            assert isinstance(row.said, Conversation)  # only rows of CodeV-R1's form are compiled
            codev.check_syntax(codev.fenced_code(row.said.messages), str(self._iverilog))
        except RowDropped as problem:
            return problem
        return None

    def _tokenise(self, taken: list[_Taken]) -> Iterator[TokenisedRow]:
        for row, examples in zip(taken, _examples(self._chat, taken), strict=True):
            if isinstance(examples, RowDropped):
                self.report.drop(examples, row.origin)
                continue
            lengths = [example.slots for example in examples]
            fitting = [e for e, length in zip(examples, lengths, strict=True) if length <= self._data.sequence_length]
            if fitting:
                self.report.rows_split += len(examples) > 1
                self.report.examples_too_long += len(examples) - len(fitting)
                yield TokenisedRow(fitting, row.source, row.origin, row.identity)
            else:
                self.report.drop(RowDropped("too_long", f"{max(lengths)} tokens"), row.origin)


def _without_bytes(example: Example) -> Example:
    """An example whose pictures' bytes are released: all rows stay in memory, where the bytes would not fit."""
    return example._replace(pictures=tuple(replace(picture, source="") for picture in example.pictures))


def _in_words(value: Any) -> str:
    """A representation of values that JSON lacks; for bytes, which can be a whole picture, their hash."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _begun(place: SourcePlace, normaliser: Normaliser) -> Iterator[RawRow]:
    """The rows of a source, once the first ones have determined their form."""
    rows = place.rows()
    first = list(itertools.islice(rows, FIRST_ROWS))
    normaliser.begin(place.name, first)
    yield from first
    yield from rows


def _in_turn(each: list[Iterator[RawRow]]) -> Iterator[tuple[int, RawRow]]:
    return ((number, row) for number, of_source in enumerate(each) for row in of_source)


def _by_weight(each: list[Iterator[RawRow]], weights: list[float], limit: int) -> Iterator[tuple[int, RawRow]]:
    """Yields (source, row) for the first `limit` rows, taken from the sources in proportion to their weights."""
    taken = dict.fromkeys(range(len(each)), 0)
    while limit and taken:
        # The D'Hondt method for allocating seats: the next row comes from the source with the lowest (rows + 1) /
        # weight.
        number = min(taken, key=lambda source: (taken[source] + 1) / weights[source])
        row = next(each[number], None)
        if row is None:
            del taken[number]
            continue
        taken[number] += 1
        limit -= 1
        yield number, row


def _examples(chat: ChatFormat, taken: list[_Taken]) -> list[list[Example] | RowDropped]:
    """The verified examples of each row, or the reason for dropping it."""
    said = [row.said for row in taken]
    rendered: list[Rendering | RowDropped] = []
    for row in taken:
        sides = list(row.said.sides.values()) if isinstance(row.said, Pair) else [row.said]
        with at(row.origin.file, str(row.origin.row)):
            rendered += [_rendered(chat, conversation) for conversation in sides]
    texts = [made for made in rendered if isinstance(made, Rendering)]
    with at(*_span(taken)):
        proven = iter(chat.examples(texts))
    made = iter([one if isinstance(one, RowDropped) else next(proven) for one in rendered])
    return [_pair({name: next(made) for name in one.sides}) if isinstance(one, Pair) else next(made) for one in said]


def _span(taken: list[_Taken]) -> tuple[str, str]:
    """The file of the first row, and which rows are read together."""
    if not taken:
        return "", ""
    first, last = taken[0].origin, taken[-1].origin
    return first.file, f"{first.row} to {'' if last.file == first.file else f'{shown(last.file)}:'}{last.row}"


def _pair(sides: dict[str, list[Example] | RowDropped]) -> list[Example] | RowDropped:
    """Both sides as one example; dropped if either side is."""
    whole: list[Example] = []
    for name, made in sides.items():
        if isinstance(made, RowDropped):
            return RowDropped(made.reason, f"{name}: {made.detail}" if made.detail else name)
        if len(made) > 1:
            return RowDropped("split_side", f"{name}: {len(made)} examples")
        whole += made
    chosen, rejected = whole
    if np.array_equal(chosen.ids, rejected.ids):
        return RowDropped("equal_sides", "once they are rendered")
    ids, flags = (np.concatenate(both) for both in zip(chosen[:2], rejected[:2], strict=True))
    pictures = chosen.pictures + rejected.pictures
    return [Example(ids, flags, chosen.answers + rejected.answers, second=len(chosen.ids), pictures=pictures)]


def _rendered(chat: ChatFormat, conversation: Conversation) -> Rendering | RowDropped:
    try:
        with row_limit():
            return chat.render(conversation)
    except RowDropped as problem:
        return problem
    except Exception as error:
        return unreadable(error)
