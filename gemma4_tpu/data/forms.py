"""The supported forms of rows, each a function from a row's columns to one normal form: a conversation, or a pair.

To add a form, add a function and a line in `FORMS`. Imports neither JAX nor NumPy, because the checks list the forms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gemma4_tpu.data import codev
from gemma4_tpu.data.calls import Tell, Turn, parsed, to_tools
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.turns import CALLS, THOUGHT_KEYS, to_turns

AUTO = "auto"
CONVERSATIONS, PAIRS = "conversations", "pairs"
"""Kinds of rows: a conversation each, or two answers to the same prompt."""
TURN_COLUMNS = ("role", "content")
NAMES = {
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "tools": ("tools", "functions"),
    "system": ("system", "system_prompt"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "history": ("history",),
    "prompt": ("prompt", "question", "query", "problem", "input"),
    "completion": ("completion", "response", "answer", "solution", "output"),
    "text": ("text",),
}
"""Column → other names for it. If a row has several of these but not the first, none is chosen."""


@dataclass(frozen=True)
class Conversation:
    """What one row says, in normal form (`turns.py`)."""

    messages: list[Turn]
    """Empty for plain text."""
    tools: list[dict[str, Any]] | None = None
    """Tool definitions, `{"type": "function", "function": {…}}`."""
    text: str | None = None
    """Plain text for continued pre-training; all of it carries loss."""

    def each(self, change: Callable[[Conversation], Conversation]) -> Conversation:
        """Applies `change` to the conversation."""
        return change(self)


@dataclass(frozen=True)
class Pair:
    """Two conversations that are identical up to an answer, one of them better."""

    chosen: Conversation
    rejected: Conversation

    @property
    def sides(self) -> dict[str, Conversation]:
        """Both sides by name, in the order in which they are packed."""
        return {CHOSEN: self.chosen, REJECTED: self.rejected}

    def each(self, change: Callable[[Conversation], Conversation]) -> Pair:
        """Applies `change` to both sides."""
        return Pair(change(self.chosen), change(self.rejected))


CHOSEN, REJECTED = "chosen", "rejected"
Said = Conversation | Pair
"""What a row says."""


class Columns:
    """The columns of a row under their usual names; records which ones are used."""

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        self.used: set[str] = set()

    def get(self, column: str) -> Any:
        """The value of a column; None if the row lacks it."""
        name = name_of(column, self._row)
        if name is None:
            return None
        self.used.add(name)
        return self._row[name]

    def take(self, names: Iterable[str]) -> dict[str, Any]:
        """The columns with exactly these names, where present."""
        there = {name: self._row[name] for name in names if name in self._row}
        self.used |= there.keys()
        return there

    def text(self, column: str) -> str:
        """The text of a column, with numbers converted; empty if the row lacks it.

        Raises:
          RowDropped: the column holds something else.
        """
        value = self.get(column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise RowDropped("bad_content", f"{column} is {type(value).__name__}")
        return value or ""


def name_of(column: str, names: Iterable[str]) -> str | None:
    """The name under which a row with these column names has a column; None if it has none, or several candidates."""
    called = NAMES.get(column, (column,))
    there = [name for name in called if name in names]
    return there[0] if len(there) == 1 or called[0] in there else None


def _messages(columns: Columns, turn_columns: Mapping[str, str], tell: Tell) -> Conversation:
    given = columns.get("messages")
    turns = to_turns(columns.get("conversations") if given is None else given, turn_columns, tell)
    return _conversation(turns, columns, tell)


def _instruction(columns: Columns, turn_columns: Mapping[str, str], tell: Tell) -> Conversation:
    instruction, more, output = (columns.text(name) for name in ("instruction", "input", "output"))
    if not instruction.strip():
        raise RowDropped("no_prompt")
    if not output.strip():
        raise RowDropped("no_response")
    history = columns.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowDropped("bad_content", "history is not a list of pairs")
    said = [*(text for pair in history for text in pair), f"{instruction}\n\n{more}" if more.strip() else instruction]
    given = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate([*said, output])]
    return _conversation(to_turns(given, {}, tell), columns, tell)


def _prompt_completion(columns: Columns, turn_columns: Mapping[str, str], tell: Tell) -> Conversation:
    """A prompt and its completion, each a text or turns. Answers within the prompt carry no loss."""
    before = _without_loss(_said("prompt", "user", "no_prompt", columns, turn_columns, tell), tell)
    answered = _said("completion", "assistant", "no_response", columns, turn_columns, tell)
    return _conversation([*before, *answered], columns, tell)


def _preference(columns: Columns, turn_columns: Mapping[str, str], tell: Tell) -> Pair:
    """Two answers to one prompt: whole conversations with a common beginning, or completions of a separate prompt."""
    sides = [_said(name, "assistant", "no_response", columns, turn_columns, tell) for name in (CHOSEN, REJECTED)]
    if any(side[0]["role"] == "assistant" for side in sides):
        asked = _said("prompt", "user", "no_prompt", columns, turn_columns, tell)
        sides = [[*asked, *side] for side in sides]
    shared = next((n for n, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
    rest = [side[shared:] for side in sides]
    if not any(rest):
        raise RowDropped("equal_sides")
    if not shared or not all(turns and turns[0]["role"] == "assistant" for turns in rest):
        told = ["ends" if not turns else f"continues with a {turns[0]['role']} turn" for turns in rest]
        raise RowDropped("different_prompts", f"after {shared} turns chosen {told[0]}, rejected {told[1]}")
    before = _without_loss(sides[0][:shared], tell)
    return Pair(*(_conversation([*before, *turns], columns, tell) for turns in rest))


def _said(
    column: str, role: str, absent: str, columns: Columns, turn_columns: Mapping[str, str], tell: Tell
) -> list[Turn]:
    """The turns in a column: its own, or one turn of `role` with its text; `absent` is the drop reason for an empty
    column.
    """
    given = _turns_in(columns.get(column), turn_columns, tell)
    if not isinstance(given, list | dict):
        text = columns.text(column)
        if not text.strip():
            raise RowDropped(absent)
        given = [{"role": role, "content": text}]
    return to_turns(given, turn_columns, tell)


def _without_loss(turns: list[Turn], tell: Tell) -> list[Turn]:
    """The turns of a prompt; its answers carry no loss."""
    if any(turn["role"] == "assistant" for turn in turns):
        tell("answers in a prompt carry no loss")
    return [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in turns]


def _turns_in(value: Any, turn_columns: Mapping[str, str], tell: Tell) -> Any:
    """A value, with turns parsed if it is JSON text of a list of them (in CSV, for example)."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    roles = {"role", "from", turn_columns.get("role", "role")}
    # Other data has such keys too: the staff of a firm a `role`, a journey a `from`.
    says = {"content", "value", turn_columns.get("content", "content"), *CALLS, *THOUGHT_KEYS}
    if not found or not all(isinstance(turn, dict) and roles & turn.keys() and says & turn.keys() for turn in found):
        return value
    return parsed(value, "turns", tell)


def _conversation(turns: list[Turn], columns: Columns, tell: Tell) -> Conversation:
    """Turns, with the system prompt and the tools taken from separate columns."""
    system = columns.text("system")
    if system.strip() and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    elif system.strip():
        tell("column system not used: the turns have their own")
    return Conversation(turns, to_tools(columns.get("tools"), tell))


def _text(columns: Columns, turn_columns: Mapping[str, str], tell: Tell) -> Conversation:
    text = columns.text("text")
    if not text.strip():
        raise RowDropped("no_text")
    return Conversation([], None, text)


def _codev(columns: Columns, turn_columns: Mapping[str, str], tell: Tell) -> Conversation:
    return Conversation(codev.to_messages(columns.take(codev.COLUMNS)))


class Form(NamedTuple):
    """One form of rows: the columns that identify it, the function that reads it, and the kind of rows it gives."""

    needs: tuple[str, ...]
    make: Callable[[Columns, Mapping[str, str], Tell], Said]
    rows: str = CONVERSATIONS


FORMS = {
    "chat": Form(("messages",), _messages),
    "sharegpt": Form(("conversations",), _messages),
    "alpaca": Form(("instruction", "output"), _instruction),
    "prompt_completion": Form(("prompt", "completion"), _prompt_completion),
    "text": Form(("text",), _text),
    "codev_r1": Form(("prompt",), _codev),
    "preference": Form((CHOSEN, REJECTED), _preference, PAIRS),
}
"""`data.format` → form, in the order in which `auto` tries those of a kind (CodeV-R1's is recognised by its answers).
"""
