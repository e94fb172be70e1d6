"""Tool calls, tool responses and tool definitions in one normal form; parses calls as Gemma writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.markup import QUOTE

Turn = dict[str, Any]
Tell = Callable[[str], None]
"""Records a change made to the row, in words."""

CALL_KEYS = {"id", "type", "index", "function"}
TOOL_KEYS = {"name", "description", "parameters", "response", "return", "strict"}
_DEEPEST = 64  # levels of nesting in the arguments of a call


def parsed(value: Any, what: str, tell: Tell) -> Any:
    """Parses a value that may be JSON text, possibly encoded twice; any other text is returned unchanged.

    Raises:
      RowDropped: an object in it has the same key twice.
    """
    while isinstance(value, str) and value.strip():
        try:
            value = json.loads(value, object_pairs_hook=_without_twice)
        except (ValueError, RecursionError):
            break
        tell(f"{what} given as a JSON string")
    return value


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; Python itself would silently keep the last value of a key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise RowDropped("invalid_json", f"the key {twice[:40]!r} appears twice in one object")
    return made


def with_identities(turns: list[Turn], tell: Tell) -> list[Turn]:
    """Records on each response which call it answers: matched by id, else by name, else by order.

    Without this, templates label a response with the wrong call's name, or with none. A single call without an id needs
    no label.

    Raises:
      RowDropped: a response answers a call that does not exist.
    """
    pending: list[Turn] = []
    identified = several = in_words = False
    for position, turn in enumerate(turns):
        if turn["role"] != "tool":
            pending = list(turn.get("tool_calls", []))
            identified, several = any("id" in call for call in pending), len(pending) > 1
            in_words = "<tool_call>" in str(turn.get("content")) and not pending
            continue
        if in_words:  # as Hermes writes them
            raise RowDropped(
                "bad_tool_call", f"turn {position}: a response to a call that is text; write <tool_call> as tool_calls"
            )
        if not pending:
            continue
        key = turn.get("tool_call_id")
        fitting = [call for call in pending if key is None or not identified or call.get("id") == key]
        if not fitting:
            raise RowDropped("bad_tool_call", f"turn {position}: no call has the id {str(key)[:40]!r}")
        call = next((call for call in fitting if call["function"]["name"] == turn.get("name")), fitting[0])
        pending.remove(call)
        if (key is None or not identified) and (identified or several or key is not None):
            tell("responses matched to calls by name or order")
            turn["tool_call_id"] = call.setdefault("id", key if key is not None else str(position))
    return turns


def to_calls(calls: Any, position: int, tell: Tell) -> list[Turn]:
    """Normalises tool calls to `{"type": "function", "function": {"name": …, "arguments": {…}}}`, keeping a given `id`.

    Raises:
      RowDropped: the calls are malformed.
    """
    calls = parsed(calls, "tool_calls", tell)
    if calls is None or calls == "" or calls == [] or calls == {}:
        return []
    made = []
    for call in [calls] if isinstance(calls, dict) else calls if isinstance(calls, list) else [None]:
        call = parsed(call, "tool_calls", tell)
        call = call if isinstance(call, dict) else {}
        inside = parsed(call.get("function", call), "functions", tell)
        function = inside if isinstance(inside, dict) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name.strip():
            raise RowDropped("bad_tool_call", f"turn {position}: {str(calls)[:60]}")
        others = function.keys() - {"name", "arguments", *(CALL_KEYS if function is call else ())}
        if others and "arguments" not in function:
            raise RowDropped("bad_tool_call", f"turn {position}: no arguments, but {', '.join(sorted(others))}"[:100])
        for key in others if function is call else others | (call.keys() - CALL_KEYS):
            tell(f"key {key[:40]!r} of tool calls left out")
        arguments = parsed(function.get("arguments"), "arguments", tell)
        if arguments is None or arguments == "":
            arguments = {}
        if not isinstance(arguments, dict) or not _finite(arguments):
            what = "are not an object" if not isinstance(arguments, dict) else "hold a number that is not finite"
            raise RowDropped("bad_tool_call", f"turn {position}: arguments of {name[:40]!r} {what}")
        identity = {"id": str(call["id"])} if call.get("id") is not None else {}
        made.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return made


def _finite(value: Any) -> bool:
    """Whether a value is valid JSON, which excludes NaN and infinity (Python's reader accepts them)."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return False
    return True


def to_tools(tools: Any, tell: Tell) -> list[Turn] | None:
    """Normalises tool definitions to `{"type": "function", "function": {…}}`; None if there are none.

    Raises:
      RowDropped: the definitions are malformed.
    """
    tools = parsed(tools, "tools", tell)
    if tools is None or tools == "" or tools == [] or tools == {}:
        return None
    made = []
    for tool in [tools] if isinstance(tools, dict) else tools if isinstance(tools, list) else [None]:
        tool = parsed(tool, "tools", tell)
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tell("bare functions wrapped as tools")
            tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        function = parsed(tool.get("function"), "tools", tell) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowDropped("bad_tool_call", f"tools: {str(tools)[:60]}")
        parameters = parsed(function.get("parameters"), "parameters of tools", tell)
        if parameters is None and (others := function.keys() - TOOL_KEYS):  # templates would omit the schema
            raise RowDropped("bad_tool_call", f"tools: no parameters, but {', '.join(sorted(others))}"[:100])
        made.append(
            {**tool, "function": {**function, **({"parameters": parameters} if parameters is not None else {})}}
        )
    return made


def read_call(written: str) -> tuple[str, Turn]:
    """(name, arguments) of a call in Gemma 4's notation between its control tokens: `call:name{key:value,…}`.

    Strings are delimited by `<|"|>`. An undelimited value is a JSON number, true, false or null (`None` in Google's
    templates of April 2026); anything else is read as a string.

    Raises:
      ValueError: the text is not such a call.
    """
    head, brace, _ = written.partition("{")
    name = head.strip().removeprefix("call:").strip()
    if not head.strip().startswith("call:") or not name or not brace:
        raise ValueError(f"not a call: {written[:60]!r}")
    reader = _CallReader(written, len(head))
    arguments = reader.value()
    if written[reader.at :].strip():
        raise ValueError(f"text after a call: {written[reader.at :][:60]!r}")
    return name, arguments


class _CallReader:
    """Parses one value at a time; `at` is the current position."""

    def __init__(self, text: str, at: int):
        self._text, self.at, self._depth = text, at, 0

    def value(self) -> Any:
        if self._take(QUOTE):
            return self._until(QUOTE)
        if self._take("{"):
            return dict(self._inside("}", lambda: (self._key(), self.value())))
        if self._take("["):
            return self._inside("]", self.value)
        bare = self._bare(",}]")
        try:
            found = json.loads("null" if bare == "None" else bare, parse_constant=str)
        except ValueError:
            return bare
        return bare if found in (math.inf, -math.inf) else found

    def _inside(self, end: str, read: Callable[[], Any]) -> list[Any]:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"a call with more than {_DEEPEST} levels")
        items: list[Any] = []
        while not self._take(end):
            if items and not self._take(","):
                raise ValueError(f"no comma before {self._text[self.at :][:30]!r}")
            items.append(read())
        self._depth -= 1
        return items

    def _key(self) -> str:
        key = self._until(QUOTE) if self._take(QUOTE) else self._bare(":,{}[]")
        if not self._take(":"):
            raise ValueError(f"no colon after the key {key[:30]!r}")
        return key

    def _take(self, mark: str) -> bool:
        while self._text[self.at : self.at + 1].isspace():
            self.at += 1
        found = self._text.startswith(mark, self.at)
        self.at += len(mark) * found
        return found

    def _until(self, mark: str) -> str:
        start, self.at = self.at, self._text.find(mark, self.at)
        if self.at < 0:
            raise ValueError(f"an unterminated string: {self._text[start:][:30]!r}")
        self.at += len(mark)
        return self._text[start : self.at - len(mark)]

    def _bare(self, ends: str) -> str:
        start = self.at
        while self.at < len(self._text) and self._text[self.at] not in ends:
            self.at += 1
        if not (bare := self._text[start : self.at].strip()):
            raise ValueError(f"a missing value before {self._text[self.at :][:30]!r}")
        return bare
