"""Verifies that an example says what its row says, by reading it back from its token ids, message by message.

An example is trained on only if

1. every message appears in it once, in conversation order, inside its own turn (or tool block), and nothing else opens,
   closes or imitates one;
2. loss is on exactly the trained answers, including their thoughts and calls, and on the token that ends each: the end
   of the turn, or the token that hands over to a tool.

(`chat` ensures that each answer continues exactly the ids of a server's prompt when it assembles examples.) Nothing
here knows a template: each message must find its text among the stretches between control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from gemma4_tpu.data import markup
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.pictures import Picture
from gemma4_tpu.data.stretches import SHOWN, TEXT, TURN_OF, Splitter, Stretch, shown
from gemma4_tpu.data.turns import IMAGE_PART

_MARKS = set("{}[]:,")


class Span(NamedTuple):
    """The ids of one answer that carry loss."""

    message: int  # its index in the conversation
    start: int
    stop: int  # one past the token that ends it


class Prover:
    """Verifies examples made with one tokenizer.

    Args:
      control: the tokenizer's control tokens and their ids.
      bos: the id that begins every example.
      header: int32 ids that open the model's turn, after the turn token itself.
      words: text that the template itself adds (before, after) a message, by role.
    """

    def __init__(self, control: dict[str, int], bos: int, header: np.ndarray, words: dict[str, tuple[str, str]]):
        self._names = {number: name for name, number in control.items()}
        self._splitter = Splitter(control, bos, header)
        self._words = words

    def check(
        self, ids: np.ndarray, text: str, messages: list[dict[str, Any]], tools: list[Any] | None, spans: list[Span]
    ) -> None:
        """Verifies one example.

        Args:
          ids: int32 [n + 1].
          text: the text that they encode.
          messages: the conversation up to its last answer.
          tools: the declared tools.
          spans: the ids of every answer with loss.

        Raises:
          RowDropped: `bad_rendering`, naming the message and what was found instead.
        """
        pieces = self._splitter.split(ids, text)
        _Assigner(pieces, messages, tools or [], {span.message for span in spans}, self._words).read()
        for span in spans:
            _check_span(ids, pieces, span, messages, self._names)


class _Assigner:
    """Assigns every stretch to the message that it belongs to."""

    def __init__(
        self, pieces: list[Stretch], messages: list[dict[str, Any]], tools: list[Any], answers: set[int],
        words: dict[str, tuple[str, str]],
    ):  # fmt: skip
        self._pieces = [piece for piece in pieces if not piece.blank]
        self._words = words
        self._messages = messages
        self._tools = tools
        self._answers = answers
        self._at = 0
        self._role: str | None = None  # role of the open turn

    def read(self) -> None:
        """Raises RowDropped unless every message is found and nothing is left over."""
        for number, message in enumerate(self._messages):
            if number == 0:
                self._read_system(message)
            if message["role"] == "user":
                self._open(number)
                self._take_content(number)
                self._close(number)
            elif message["role"] == "assistant":
                self._read_answer(number, message)
            elif message["role"] == "tool":
                self._read_response(number, message)
        self._leave_turn()
        # An answer can end by handing over to a tool whose response has not come yet.
        if (rest := self._peek()) and rest.kind == markup.TOOL_RESPONSE and not rest.closed and not any(rest.texts):
            self._at += 1
        if rest := self._peek():
            raise RowDropped("bad_rendering", f"the last message is followed by {shown(rest)}")

    def _read_system(self, first: dict[str, Any]) -> None:
        """Reads the first turn: the system message, the tools, or the template's own text."""
        told = first["role"] == "system"
        piece = self._peek()
        if piece is None or piece.kind != markup.TURN or piece.texts[0] not in TURN_OF["system"]:
            if told or self._tools:
                raise self._problem(0, "the system turn is missing")
            return
        self._at += 1
        said, declared = [], []
        while (piece := self._peek()) and piece.kind != markup.TURN_END:
            if piece.kind == TEXT:
                said.append(piece.texts[0])
            elif piece.kind == markup.TOOL:
                declared.append(piece)
            else:
                raise self._problem(0, f"{shown(piece)} in the system turn")
            self._at += 1
        self._at += 1
        content = _texts(first)
        if told and content and sum(self._says("system", text, content) for text in said) != 1:
            raise self._problem(0, f"the system turn reads {' '.join(said).strip()[:SHOWN]!r}")
        names = [str((tool.get("function") or tool).get("name", "")) for tool in self._tools]
        if len(declared) != len(names) or not all(
            name in "".join(piece.texts) for name, piece in zip(names, declared, strict=True)
        ):
            raise self._problem(0, f"{len(declared)} of {len(names)} tools are declared as they are named")

    def _read_answer(self, number: int, message: dict[str, Any]) -> None:
        if self._role not in TURN_OF["assistant"]:
            self._open(number)
        thought = message.get("reasoning")
        calls = list(message.get("tool_calls") or [])
        content = _texts(message)
        while piece := self._peek():
            if piece.kind == markup.CHANNEL and thought and _thought(piece) == thought.strip():
                thought = None
            elif piece.kind == markup.TOOL_CALL and calls and _is_call(piece, calls[0]):
                calls.pop(0)
            elif piece.kind == TEXT and content and _is(piece.texts[0], content):
                content = []
            else:
                break
            piece.owner = number
            self._at += 1
        lost = bool(thought) and number in self._answers  # templates can omit the thoughts of earlier turns
        if calls or content or lost:
            missing = f"the call of {calls[0]['function']['name']!r}" if calls else "its content"
            missing = missing if calls or content else "its thought"
            raise self._problem(number, f"instead of {missing}, found {shown(self._peek())}")
        self._leave_turn()

    def _read_response(self, number: int, message: dict[str, Any]) -> None:
        if self._role not in TURN_OF["tool"]:
            self._open(number)
        piece = self._peek()
        if piece is None or piece.kind != markup.TOOL_RESPONSE or not piece.closed:
            raise self._problem(number, f"instead of the tool's response, found {shown(piece)}")
        content = _texts(message)
        # Either in its own quotes, or once within the template's text.
        written = "".join(piece.texts)
        once = isinstance(message.get("content"), str) and content and written.count(content[0]) == 1
        if content and not once and not any(_is(text, content) for text in (written, *piece.texts)):
            raise self._problem(number, f"the tool's response reads {shown(piece)}")
        piece.owner = number
        self._at += 1
        self._leave_turn()

    def _take_content(self, number: int) -> None:
        """Reads the texts and pictures of a message, in order."""
        for content in _content(self._messages[number]) or [[]]:
            if isinstance(content, Picture):
                self._take_picture(number, content)
            else:
                self._take_text(number, content)

    def _take_picture(self, number: int, picture: Picture) -> None:
        piece = self._peek()
        whole = piece is not None and piece.kind == markup.IMAGE_START and piece.closed and not any(piece.texts)
        if piece is None or not whole or piece.soft_tokens != picture.tokens:
            raise self._problem(number, f"instead of a picture of {picture.tokens} tokens, found {shown(piece)}")
        piece.owner = number
        self._at += 1

    def _take_text(self, number: int, content: list[str]) -> None:
        piece = self._peek()
        if piece is not None and piece.kind == TEXT:
            if not self._says("user", piece.texts[0], content):
                raise self._problem(number, f"its turn reads {shown(piece)}")
            piece.owner = number
            self._at += 1
        elif content:
            raise self._problem(number, f"instead of its content, found {shown(piece)}")

    def _says(self, role: str, found: str, content: list[str]) -> bool:
        before, behind = self._words.get(role, ("", ""))
        return _is(found.strip().removeprefix(before).removesuffix(behind), content)

    def _open(self, number: int) -> None:
        piece = self._peek()
        role = self._messages[number]["role"]
        if self._role is not None or piece is None or piece.kind != markup.TURN or piece.texts[0] not in TURN_OF[role]:
            raise self._problem(number, f"instead of its turn, found {shown(piece)}")
        self._role = piece.texts[0]
        self._at += 1

    def _close(self, number: int) -> None:
        if not self._leave_turn():
            raise self._problem(number, f"its turn continues with {shown(self._peek())}")

    def _leave_turn(self) -> bool:
        """Skips the end of a turn, if it comes next."""
        piece = self._peek()
        if piece is None or piece.kind != markup.TURN_END:
            return False
        self._role = None
        self._at += 1
        return True

    def _peek(self) -> Stretch | None:
        return self._pieces[self._at] if self._at < len(self._pieces) else None

    def _problem(self, number: int, what: str) -> RowDropped:
        return RowDropped("bad_rendering", f"message {number} ({self._messages[number]['role']}): {what}")


def _check_span(
    ids: np.ndarray, pieces: list[Stretch], span: Span, messages: list[dict[str, Any]], names: dict[int, str]
) -> None:
    """Checks that the ids of an answer hold all of its message, nothing else, and the token that ends it."""
    last = span.stop - 1
    inside = [piece for piece in pieces if piece.stop > span.start and piece.start < last]
    own = [piece for piece in pieces if piece.owner == span.message]
    # The prompt can have opened the thought already, so that its channel begins before the answer does.
    begun = [piece for piece in own if piece.start < span.start and piece.kind != markup.CHANNEL]
    foreign = [piece for piece in inside if piece.owner != span.message and not piece.space]
    cut = [piece for piece in own if piece.stop > last or piece.stop <= span.start]
    ends = names.get(int(ids[last])) in (markup.TURN_END, markup.TOOL_RESPONSE)
    if begun or foreign or cut or not own or not ends:
        odd = (begun + foreign + cut)[:1] if ends else []
        what = f"its loss would be on {shown(odd[0])}" if odd else "the template does not end its turn"
        role = messages[span.message]["role"]
        raise RowDropped("bad_rendering", f"message {span.message} ({role}): {what}")


def _texts(message: dict[str, Any]) -> list[str]:
    """The texts of a message, stripped of surrounding white space, without empty ones."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return [text for part in parts if (text := part.strip())]


def _content(message: dict[str, Any]) -> list[list[str] | Picture]:
    """The texts of a message as in `_texts`, grouped between pictures, and its pictures, in order."""
    content = message.get("content") or ""
    content = [{"text": content}] if isinstance(content, str) else content
    found: list[list[str] | Picture] = []
    for are_pictures, group in groupby(content, key=lambda part: part.get("type") == IMAGE_PART):
        parts = list(group)
        if are_pictures:
            found += [part["image"] for part in parts]
        elif texts := _texts({"content": parts}):
            found.append(texts)
    return found


def _is(found: str, expected: list[str]) -> bool:
    """Whether `found` is the `expected` texts in order, separated and surrounded by nothing but white space."""
    at = 0
    for text in expected:
        while at < len(found) and found[at].isspace() and not found.startswith(text, at):
            at += 1
        if not found.startswith(text, at):
            return False
        at += len(text)
    return not found[at:].strip()


def _thought(piece: Stretch) -> str:
    return "".join(piece.texts).strip().removeprefix("thought").strip()


def _is_call(piece: Stretch, call: dict[str, Any]) -> bool:
    """Whether a block is exactly this call: its name and all its arguments, in Gemma 4's notation or in JSON."""
    function = call["function"]
    arguments = function.get("arguments") or {}
    head, _, rest = markup.QUOTE.join(piece.texts).partition("{")
    if not piece.closed or not re.search(rf"(?<![\w.-]){re.escape(function['name'])}$", head.strip()):
        return False
    written = "{" + rest.strip()
    # Keys are written without quotes: a key that contains the notation's own delimiters would be read as something
    # else.
    plain = not any(_MARKS & set(key) for key in _keys(arguments))
    if plain and written in (_notation(arguments, in_order) for in_order in (True, False)):
        return True
    try:
        return json.loads(written) == arguments
    except ValueError:
        return False


def _keys(value: Any) -> Iterator[str]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(item)
    if isinstance(value, dict):
        yield from map(str, value)


def _notation(value: Any, in_order: bool) -> str:
    """A value in Gemma 4's notation, with keys in alphabetical order or in the given order."""
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0]).lower()) if in_order else value.items()
        return "{" + ",".join(f"{key}:{_notation(item, in_order)}" for key, item in items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_notation(item, in_order) for item in value) + "]"
    if isinstance(value, str):
        return f"{markup.QUOTE}{value}{markup.QUOTE}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
