"""Turns of a conversation as people write them, in one normal form.

A turn in normal form has `role` (system, user, assistant, tool) and `content`; an assistant's content is one text, its
thought stands under `reasoning`, its calls under `tool_calls`, and `train` is there where the row said whether the turn
carries loss; a tool's turn may have `tool_call_id` and `name`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.markup import split_thoughts

Turn = dict[str, Any]
Tell = Callable[[str], None]
"""Takes note of something that was done to the row, in words."""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "model": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
"""How people call who speaks → the four roles."""
THOUGHT_KEYS = ("reasoning", "reasoning_content", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text", None)
CALLS = ("tool_calls", "function_call")
CALL_KEYS = {"id", "type", "index", "function"}
LOSS_KEYS = ("weight", "train")
KNOWN = {
    "system": {*LOSS_KEYS, *CALLS},
    "user": {*LOSS_KEYS, *CALLS},
    "assistant": {*LOSS_KEYS, *CALLS, *THOUGHT_KEYS},
    "tool": {*LOSS_KEYS, *CALLS, "tool_call_id", "name"},
}
"""Keys of turns that mean something, besides who speaks and what is said."""
THINK = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)
THINK_END = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
CLOSED_ONLY = re.compile(r"([^<]*)</think>[ \t]*\n")


def parsed(value: Any, what: str, tell: Tell) -> Any:
    """A value that may be given as JSON text, also twice over; other texts stay what they are."""
    while isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
        tell(f"{what} given as a JSON string")
    return value


def to_turns(messages: Any, columns: Mapping[str, str], tell: Tell) -> list[Turn]:
    """The turns of a conversation in normal form.

    Args:
      messages: a list of turns, a dict of lists, or either as JSON text.
      columns: `role` and `content` → how this row calls them, where it has names of its own.
      tell: takes note of what was done.

    Raises:
      RowDropped: there are no turns, or one of them can't be understood.
    """
    messages = parsed(messages, "messages", tell)
    if isinstance(messages, dict) and messages and all(isinstance(value, list) for value in messages.values()):
        if len({len(value) for value in messages.values()}) > 1:
            raise RowDropped("no_messages", "a dict of lists of several lengths")
        tell("a dict of lists turned into turns")
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    elif isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list) or not messages:
        detail = "a text that is no JSON (single quotes?)" if isinstance(messages, str) else type(messages).__name__
        raise RowDropped("no_messages", detail)
    return [_turn(parsed(turn, "turns", tell), position, columns, tell) for position, turn in enumerate(messages)]


def _turn(given: Any, position: int, columns: Mapping[str, str], tell: Tell) -> Turn:
    if not isinstance(given, dict):
        raise RowDropped("bad_role", f"turn {position} is no object but {type(given).__name__}")
    turn = {key: value for key, value in given.items() if value is not None}
    for standard, own in columns.items():
        if own in turn:
            turn[standard] = turn.pop(own)
    name = _taken(turn, "role", "from")
    name = name.strip().lower() if isinstance(name, str) else name
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowDropped("bad_role", f"turn {position}: {str(name)[:40]!r}")
    if name != role:
        tell(f"role {name} read as {role}")
    content = _taken(turn, "content", "value")
    for key in turn.keys() - KNOWN[role]:
        tell(f"key {key[:40]!r} of {role} turns left out")
    made: Turn = {"role": role}
    if role == "assistant":
        made |= _answer(turn, content, position, name == "function_call", tell)
    elif calls := [key for key in CALLS if turn.get(key)]:
        raise RowDropped("bad_tool_call", f"turn {position}: {calls[0]} in a {role} turn")
    else:
        made["content"] = _content(content, position, role, tell)
    if role == "tool":
        made |= {key: str(turn[key]) for key in ("tool_call_id", "name") if key in turn}
    return made | _train(turn, role, position)


def _taken(turn: Turn, *keys: str) -> Any:
    """The value of the first of these keys that is there, taken out."""
    return next((turn.pop(key) for key in keys if key in turn), None)


def _train(turn: Turn, role: str, position: int) -> Turn:
    """`{"train": …}` where the row says whether the turn carries loss."""
    said = {key: turn[key] for key in LOSS_KEYS if key in turn}
    if not said:
        return {}
    wrong = [key for key, value in said.items() if not isinstance(value, bool | int | float) or value not in (0, 1)]
    if wrong or len(set(map(bool, said.values()))) > 1:
        told = ", ".join(f"{key}: {str(value)[:20]}" for key, value in said.items())
        raise RowDropped("bad_weight", f"turn {position}: {told}")
    train = bool(next(iter(said.values())))
    if role != "assistant" and train:
        raise RowDropped("bad_weight", f"turn {position}: loss on a {role} turn")
    return {"train": train} if role == "assistant" else {}


def _content(content: Any, position: int, role: str, tell: Tell) -> str | list[Turn]:
    """Text, or text parts, of a turn that the model reads."""
    if isinstance(content, str):
        return content
    parts = _text_parts(content)
    if parts is not None:
        return parts
    if role == "tool" and content is not None and not _has_parts(content):
        tell("results of tools given as objects written as JSON text")
        return json.dumps(content, ensure_ascii=False)
    raise RowDropped("bad_content", f"turn {position}: {_kinds(content)}")


def _text_parts(content: Any) -> list[Turn] | None:
    """`[{"type": "text", "text": …}, …]`; None where something else is among the parts."""
    if not isinstance(content, list) or not content:
        return None
    texts = [part if isinstance(part, str) else part.get("text") if _is_text(part) else None for part in content]
    return [{"type": "text", "text": t} for t in texts] if all(isinstance(t, str) for t in texts) else None


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_PARTS


def _has_parts(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content)


def _kinds(content: Any) -> str:
    if _has_parts(content):
        kinds = {str(part.get("type"))[:20] for part in content if isinstance(part, dict)} - set(map(str, TEXT_PARTS))
        return f"parts of type {', '.join(sorted(kinds))}" if kinds else "a part without text"
    return "none" if content is None else type(content).__name__


def _answer(turn: Turn, content: Any, position: int, is_call: bool, tell: Tell) -> Turn:
    """Content, reasoning and calls of an assistant's turn."""
    calls = turn.get("tool_calls")
    if is_call:
        calls, content = content, ""
    elif turn.get("function_call"):
        if calls:
            raise RowDropped("bad_tool_call", f"turn {position}: both tool_calls and function_call")
        tell("function_call turned into tool_calls")
        calls = turn["function_call"]
    made_calls = to_calls(calls, position, tell)
    thoughts = [_thought(turn[key], key, position) for key in THOUGHT_KEYS if key in turn]
    if isinstance(content, list):
        content, own = _joined(content, position, tell)
        thoughts += own
    if content is None and (made_calls or any(thoughts)):
        content = ""
    if not isinstance(content, str):
        raise RowDropped("bad_content", f"turn {position}: {_kinds(content)}")
    content, found = take_thoughts(content)
    if found:
        tell("thoughts taken out of the content")
    # The same thought under two keys (servers send both `reasoning` and `reasoning_content`) is one.
    reasoning = "\n".join(dict.fromkeys(thought for thought in [*thoughts, *found] if thought))
    return {
        "content": content,
        **({"reasoning": reasoning} if reasoning else {}),
        **({"tool_calls": made_calls} if made_calls else {}),
    }


def _thought(value: Any, key: str, position: int) -> str:
    if not isinstance(value, str):
        raise RowDropped("bad_content", f"turn {position}: {key} is {type(value).__name__}")
    return value.strip()


def _joined(parts: list[Any], position: int, tell: Tell) -> tuple[str, list[str]]:
    """(text, thoughts) of an answer's parts: texts trimmed and joined as Google's template does."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in THOUGHT_KEYS:
            thoughts.append(_thought(part.get(kind, part.get("text")), kind, position))
        elif (found := _text_parts([part])) is not None:
            texts.append(found[0]["text"].strip())
        else:
            raise RowDropped("bad_content", f"turn {position}: {_kinds(parts)}")
    tell("parts of an answer joined")
    return "".join(texts), thoughts


def take_thoughts(content: str) -> tuple[str, list[str]]:
    """(what is left of an answer, its thoughts): `<think>…</think>` at the head, and every `<|channel>…<channel|>`.

    Raises:
      RowDropped: a thought is never closed.
    """
    thoughts: list[str] = []
    at = 0
    while opened := THINK.match(content, at):
        closed = THINK_END.search(content, opened.end())
        if closed is None:
            raise RowDropped("unclosed_think")
        thoughts.append(content[opened.end() : closed.start()].strip())
        at = closed.end()
    if not at and (closed := CLOSED_ONLY.match(content)):  # the template of the model that wrote it had opened it
        thoughts.append(closed[1].strip())
        at = closed.end()
    more, rest = split_thoughts(content[at:])
    return rest.lstrip() if at or rest != content else rest, [*thoughts, *more]


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
        if not isinstance(arguments, dict):
            raise RowDropped("bad_tool_call", f"turn {position}: arguments of {name[:40]} are no object")
        identity = {"id": str(call["id"])} if call.get("id") is not None else {}
        made.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return made


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
        made.append(
            {**tool, "function": {**function, **({"parameters": parameters} if parameters is not None else {})}}
        )
    return made
