"""Pictures in rows: their places among the parts of a conversation, and what each of them is.

A part in normal form is `{"type": "image", "image": Picture}`. Pictures are identified by the contents of their files,
so one picture under ten names counts once.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gemma4_tpu.data.calls import Tell, Turn
from gemma4_tpu.data.drops import Origin, RowDropped
from gemma4_tpu.data.forms import Conversation
from gemma4_tpu.data.picture_bytes import MAX_BYTES, content_of, source_of
from gemma4_tpu.data.picture_pixels import decoded, plain_kind
from gemma4_tpu.data.turns import IMAGE_PART

COLUMNS = ("images", "image")
"""Columns with a row's pictures, in the order of their places in its turns."""
PLACE = "<image>"
"""Placeholder in a text for a picture of the column, as in LLaVA's rows."""


@dataclass(frozen=True)
class Picture:
    """A readable picture."""

    key: str
    """sha256 of its file, in hexadecimal."""
    tokens: int
    """Number of its soft tokens."""
    source: str | bytes = field(repr=False, compare=False)
    """Its file, as an address or as bytes."""

    def __str__(self) -> str:
        return self.key

    def image(self) -> Any:
        """The picture as a PIL image in RGB, rotated as its file says.

        Raises:
          RowDropped: the file is gone or has changed.
        """
        return decoded(self._file())

    def data_url(self) -> str:
        """The picture for a server, with the pixels of `image` whatever decoder the server uses.

        Raises:
          RowDropped: as for `image`.
        """
        content = self._file()
        kind = plain_kind(content)
        if kind is None:
            out = io.BytesIO()
            decoded(content).save(out, "PNG", transparency=None)
            kind, content = "png", out.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

    def _file(self) -> bytes:
        content = content_of(self.source) if isinstance(self.source, str) else self.source
        if _key(content) != self.key:
            raise RowDropped("unreadable_picture", f"{self.source!r}: changed while rows were read")
        return content


class TokenCounter(Protocol):
    """Counts the soft tokens of a picture."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the count."""

    def tokens(self, width: int, height: int) -> int:
        """Soft tokens of a picture of this size in pixels. Raises: ValueError: the size is not supported."""


class PictureReader:
    """Finds the pictures of rows and checks them."""

    def __init__(self, processor: TokenCounter):
        self._processor = processor
        self.fingerprint = json.dumps(processor.settings, sort_keys=True)
        """The settings that determine the pictures' token counts."""

    def within(self, conversation: Conversation, given: Any, origin: Origin, tell: Tell) -> Conversation:
        """Loads the pictures of a conversation; returns it with them.

        Args:
          conversation: in normal form; its picture parts contain what the row says about each, or nothing.
          given: the row's column of pictures, for the empty parts, in order.
          origin: the row's origin; paths are relative to its file.
          tell: records what was done.

        Raises:
          RowDropped: a picture is missing, unreadable or too large, or has no place.
        """
        turns, rest = conversation.messages, _listed(given)
        parts = list(picture_parts(turns))
        if rest and not parts:
            turns = _placed(turns, len(rest), tell)
        elif rest and all(part["image"] is not None for part in parts):
            tell("column of pictures unused: the turns have their own")
            rest = []
        if any(PLACE in text for turn in turns if turn["role"] == "user" for text in _texts(turn)):
            tell("<image> in texts left as text: no picture of a column belongs there")
        waiting = sum(part["image"] is None for part in picture_parts(turns))
        if waiting != len(rest):
            raise RowDropped("missing_picture", f"{len(rest)} in the column for {waiting} places in the turns")
        column = iter(rest)

        def read(part: Turn) -> Turn:
            if part["type"] != IMAGE_PART:
                return part
            what = next(column) if part["image"] is None else part["image"]
            return {"type": IMAGE_PART, "image": self.read(what, origin)}

        made = [
            {**turn, "content": [read(part) for part in turn["content"]]} if _in_parts(turn) else turn for turn in turns
        ]
        return Conversation(made, conversation.tools, conversation.text)

    def read(self, what: Any, origin: Origin) -> Picture:
        """Reads the picture that a row gives as a path, an address, a data: URL, bytes, or a struct of these.

        Raises:
          RowDropped: it is missing, unreadable or too large, or would have to be fetched from the web.
        """
        source = what.source if isinstance(what, Picture) else source_of(what, origin)
        content = content_of(source) if isinstance(source, str) else source
        if len(content) > MAX_BYTES:
            raise RowDropped("picture_too_large", f"{len(content)} bytes, more than {MAX_BYTES}")
        try:
            image = decoded(content)
            tokens = self._processor.tokens(*image.size)
        except RowDropped as problem:
            raise RowDropped(problem.reason, f"{_name(source)}{problem.detail}") from None
        except ValueError as error:
            raise RowDropped("unreadable_picture", f"{_name(source)}{error}"[:160]) from None
        return Picture(_key(content), tokens, source)


def _name(source: str | bytes) -> str:
    """Name of a picture's file, for messages."""
    return f"{source.rpartition('/')[2][-60:]}: " if isinstance(source, str) else ""


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def picture_parts(turns: Sequence[Turn]) -> Iterator[Turn]:
    """The parts of turns that are pictures, in order."""
    return (part for turn in turns if _in_parts(turn) for part in turn["content"] if part.get("type") == IMAGE_PART)


def pictures_of(turns: Sequence[Turn]) -> list[Picture]:
    """The pictures of turns in normal form, in order."""
    return [part["image"] for part in picture_parts(turns)]


def _in_parts(turn: Turn) -> bool:
    return isinstance(turn.get("content"), list)


def _listed(given: Any) -> list[Any]:
    """A column of pictures as a list, without null entries for absent ones."""
    return [one for one in (given if isinstance(given, list) else [given]) if one is not None]


def _placed(turns: list[Turn], count: int, tell: Tell) -> list[Turn]:
    """Turns with places for `count` pictures: at each `<image>` in users' texts, else before the first of these."""
    users = [turn for turn in turns if turn["role"] == "user"]
    found = sum(text.count(PLACE) for turn in users for text in _texts(turn))
    if found:
        tell("<image> in texts read as the places of the column's pictures")
        return [{**turn, "content": _cut(turn)} if turn["role"] == "user" else turn for turn in turns]
    if not users:
        return turns
    tell("pictures of the column placed before the first question")
    places = [{"type": IMAGE_PART, "image": None}] * count
    first = next(position for position, turn in enumerate(turns) if turn["role"] == "user")
    return [
        {**turn, "content": [*places, *_parts(turn)]} if position == first else turn
        for position, turn in enumerate(turns)
    ]


def _parts(turn: Turn) -> list[Turn]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(turn: Turn) -> list[str]:
    return [part["text"] for part in _parts(turn) if part["type"] == "text"]


def _cut(turn: Turn) -> list[Turn]:
    """The parts of a turn, with its texts split at each `<image>`."""
    made: list[Turn] = []
    for part in _parts(turn):
        if part["type"] != "text":
            made.append(part)
            continue
        for number, text in enumerate(part["text"].split(PLACE)):
            made += [{"type": IMAGE_PART, "image": None}] if number else []
            made += [{"type": "text", "text": own}] if (own := text.strip()) else []
    return made
