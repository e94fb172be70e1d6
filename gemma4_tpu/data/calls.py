"""Calls of tools, the responses to them, and the tools' definitions, in one normal form."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from gemma4_tpu.data.drops import RowDropped

Turn = dict[str, Any]
Tell = Callable[[str], None]
"""Takes note of something that was done to the row, in words."""

CALL_KEYS = {"id", "type", "index", "function"}
TOOL_KEYS = {"name", "description", "parameters", "response", "return", "strict"}


def parsed(value: Any, what: str, tell: Tell) -> Any:
    """A value that may be given as JSON text, also twice over; other texts stay what they are."""
    while isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
        tell(f"{what} given as a JSON string")
    return value


def with_identities(turns: list[Turn], tell: Tell) -> list[Turn]:
    """Says of each response which call it answers, by identity, else by name, else by order.

    Without that, templates name a response after another call, or after none. One call without an id needs none.

    Raises:
      RowDropped: a response answers a call that is not there.
    """
    pending: list[Turn] = []
    identified = several = False
    for position, turn in enumerate(turns):
        if turn["role"] != "tool":
            pending = list(turn.get("tool_calls", []))
            identified, several = any("id" in call for call in pending), len(pending) > 1
            continue
        if not pending:
            continue
        key = turn.get("tool_call_id")
        fitting = [call for call in pending if key is None or not identified or call.get("id") == key]
        if not fitting:
            raise RowDropped("bad_tool_call", f"turn {position}: no call has the id {str(key)[:40]!r}")
        call = next((call for call in fitting if call["function"]["name"] == turn.get("name")), fitting[0])
        pending.remove(call)
        if (key is None or not identified) and (identified or several or key is not None):
            tell("responses given to calls by name or order")
            turn["tool_call_id"] = call.setdefault("id", key if key is not None else str(position))
    return turns


def to_calls(calls: Any, position: int, tell: Tell) -> list[Turn]:
    """Calls of tools: `{"type": "function", "function": {"name": …, "arguments": {…}}}`, with `id` where it is given.

    Raises:
      RowDropped: they are malformed.
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
            what = "are no object" if not isinstance(arguments, dict) else "hold a number that is not finite"
            raise RowDropped("bad_tool_call", f"turn {position}: arguments of {name[:40]!r} {what}")
        identity = {"id": str(call["id"])} if call.get("id") is not None else {}
        made.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return made


def _finite(value: Any) -> bool:
    """Whether a value is one of JSON, which knows neither NaN nor infinity (Python's reader does)."""
    try:
        json.dumps(value, allow_nan=False, default=str)
    except ValueError:
        return False
    return True


def to_tools(tools: Any, tell: Tell) -> list[Turn] | None:
    """Definitions of tools: `{"type": "function", "function": {…}}`; None: there are none.

    Raises:
      RowDropped: they are malformed.
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
        if parameters is None and (others := function.keys() - TOOL_KEYS):  # templates would leave the schema out
            raise RowDropped("bad_tool_call", f"tools: no parameters, but {', '.join(sorted(others))}"[:100])
        made.append(
            {**tool, "function": {**function, **({"parameters": parameters} if parameters is not None else {})}}
        )
    return made
