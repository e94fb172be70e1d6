"""The forms of rows that people have, each a function from a row's columns to a conversation in one normal form.

Another form is a function and a line of `FORMS`. No JAX here, nor NumPy: the checks name the forms, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma4_tpu.data import codev
from gemma4_tpu.data.calls import Tell, Turn, parsed, to_tools
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.turns import to_turns

AUTO = "auto"
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
"""Column → what people call it. Where a row has several of the others, but not the first, none of them is guessed."""


@dataclass(frozen=True)
class Conversation:
    """What one row says, in normal form (`turns.py`)."""

    messages: list[Turn]
    """Empty for plain text."""
    tools: list[dict[str, Any]] | None = None
    """Definitions of tools, `{"type": "function", "function": {…}}`."""
    text: str | None = None
    """Plain text for continued pre-training: all of it carries loss."""


class Columns:
    """The columns of a row under the names that people give them; takes note of those that are used."""

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        self.used: set[str] = set()

    def get(self, column: str) -> Any:
        """The value of a column; None: the row does not have it."""
        name = name_of(column, self._row)
        if name is None:
            return None
        self.used.add(name)
        return self._row[name]

    def take(self, names: Iterable[str]) -> dict[str, Any]:
        """The columns with exactly these names, of those that are there."""
        there = {name: self._row[name] for name in names if name in self._row}
        self.used |= there.keys()
        return there

    def text(self, column: str) -> str:
        """The text of a column, numbers written out; empty: the row does not have it.

        Raises:
          RowDropped: it holds something else.
        """
        value = self.get(column)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise RowDropped("bad_content", f"{column} is {type(value).__name__}")
        return value or ""


def name_of(column: str, names: Iterable[str]) -> str | None:
    """What a row with these column names calls a column; None: it has none, or several that could be meant."""
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
        raise RowDropped("bad_content", "history is no list of pairs")
    said = [*(text for pair in history for text in pair), f"{instruction}\n\n{more}" if more.strip() else instruction]
    given = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate([*said, output])]
    return _conversation(to_turns(given, {}, tell), columns, tell)


def _pair(columns: Columns, turn_columns: Mapping[str, str], tell: Tell) -> Conversation:
    """A prompt and what completes it, each a text or turns. Answers in the prompt are read, not learnt."""
    asked, answered = (_turns_in(columns.get(name), turn_columns, tell) for name in ("prompt", "completion"))
    if not isinstance(asked, list | dict):
        asked = columns.text("prompt")
        if not asked.strip():
            raise RowDropped("no_prompt")
        asked = [{"role": "user", "content": asked}]
    if not isinstance(answered, list | dict):
        answered = columns.text("completion")
        if not answered.strip():
            raise RowDropped("no_response")
        answered = [{"role": "assistant", "content": answered}]
    before = to_turns(asked, turn_columns, tell)
    if history := [turn for turn in before if turn["role"] == "assistant"]:
        tell("answers in a prompt carry no loss")
        for turn in history:
            turn["train"] = False
    return _conversation([*before, *to_turns(answered, turn_columns, tell)], columns, tell)


def _turns_in(value: Any, turn_columns: Mapping[str, str], tell: Tell) -> Any:
    """A value, its turns where it is JSON text of a list of them (in CSV, say)."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    told: list[str] = []
    found = parsed(value, "turns", told.append)
    roles = {"role", "from", turn_columns.get("role", "role")}
    if not isinstance(found, list) or not found or not all(isinstance(t, dict) and roles & t.keys() for t in found):
        return value
    tell(told[0])
    return found


def _conversation(turns: list[Turn], columns: Columns, tell: Tell) -> Conversation:
    """Turns with the system prompt and the tools that stand in columns of their own."""
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


class Form:
    """One form of rows: the columns that tell it, and what makes a conversation of them."""

    def __init__(self, needs: tuple[str, ...], make: Callable[[Columns, Mapping[str, str], Tell], Conversation]):
        self.needs = needs
        self.make = make


FORMS = {
    "chat": Form(("messages",), _messages),
    "sharegpt": Form(("conversations",), _messages),
    "alpaca": Form(("instruction", "output"), _instruction),
    "prompt_completion": Form(("prompt", "completion"), _pair),
    "text": Form(("text",), _text),
    "codev_r1": Form(("prompt",), _codev),
}
"""`data.format` → form, in the order in which `auto` tries them (the last one by what its answers hold)."""
