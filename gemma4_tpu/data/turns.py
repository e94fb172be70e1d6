"""Normalises the turns of a conversation.

A normalised turn has `role` (system, user, assistant, tool) and `content`. An assistant's content is one text, with its
thought in `reasoning` and its calls in `tool_calls`; `train` is set if the row said whether the turn carries loss. A
tool's turn can have `tool_call_id` and `name`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gemma4_tpu.data.calls import Tell, Turn, parsed, to_calls, with_identities
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.markup import split_thoughts

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "model": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Names used for speakers → the four roles."""
THOUGHT_KEYS = ("reasoning", "reasoning_content", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text", None)
CALL_PARTS = {"tool_use", "tool_result"}
IMAGE_PART = "image"
"""Type of a normalised part that is a picture; its `image` names the picture, None stands for the next one in the row's
column.
"""
IMAGE_PARTS = (IMAGE_PART, "image_url", "input_image")
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
"""Keys by which a part gives its picture: a path, an address, bytes, or an object that holds one of these."""
CALLS = ("tool_calls", "function_call")
CALL_ROLES = ("function_call", "tool_call")
"""Roles whose content is a call."""
RESPONSES = "tool_responses"
"""Responses stored in the turn of their calls, as in Gemma's own documentation."""
LOSS_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Names used for whether a turn carries loss: OpenAI's, axolotl's, ms-swift's."""
UNCLEAR_LOSS = ("mask", "masked", "train_detail", "training_detail")
"""Names used for loss on a part of a turn, or with either meaning."""
KNOWN = {
    "system": {*LOSS_KEYS, *CALLS},
    "user": {*LOSS_KEYS, *CALLS},
    "assistant": {*LOSS_KEYS, *CALLS, *THOUGHT_KEYS, RESPONSES},
    "tool": {*LOSS_KEYS, *CALLS, "tool_call_id", "name"},
}
"""Meaningful keys of turns, besides role and content."""
THINK = re.compile(r"\s*(?:<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>)", re.IGNORECASE)
THINK_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>", re.IGNORECASE)
OPENED = re.compile(THINK.pattern.removeprefix(r"\s*"), re.IGNORECASE)
SOLUTION = re.compile(r"\s*<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*", re.DOTALL)
TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning|tool_call)>|<\|(?:begin|end)_of_\w+\|>", re.IGNORECASE)
AFTER_THOUGHT = re.compile(r"\A(?:\s*\n|\s+)")
"""White space between a thought and its answer; an indent of the answer's own first line is not part of it."""
CLOSED_ONLY = re.compile(r"</think>[ \t]*\n", re.IGNORECASE)


def to_turns(messages: Any, columns: Mapping[str, str], tell: Tell) -> list[Turn]:
    """Normalises the turns of a conversation.

    Args:
      messages: a list of turns, a dict of lists, or either as JSON text.
      columns: `role` and `content` → this row's names for them, if they differ.
      tell: records the changes made.

    Raises:
      RowDropped: there are no turns, or one of them cannot be understood.
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
        detail = "a text that is not JSON (single quotes?)" if isinstance(messages, str) else type(messages).__name__
        raise RowDropped("no_messages", detail)
    made = [_turn(parsed(turn, "turns", tell), position, columns, tell) for position, turn in enumerate(messages)]
    return with_identities([turn for turns in made for turn in turns], tell)


def _turn(given: Any, position: int, columns: Mapping[str, str], tell: Tell) -> list[Turn]:
    """The turn, or several if the given one also holds the responses to its calls."""
    if not isinstance(given, dict):
        raise RowDropped("bad_role", f"turn {position} is not an object but {type(given).__name__}")
    turn = {key: value for key, value in given.items() if value is not None}
    for standard, own in columns.items():
        if own in turn:
            turn[standard] = turn.pop(own)
    name = _taken(turn, "role", "from")
    name = name.strip().lower() if isinstance(name, str) else name
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        told = f"{str(name)[:40]!r}" if name is not None else f"none among {_shown(given)}"
        raise RowDropped("bad_role", f"turn {position}: {told}")
    if name != role:
        tell(f"role {name} read as {role}")
    content = _taken(turn, "content", "value")
    if content is None and not turn.keys() & {*CALLS, *THOUGHT_KEYS, RESPONSES}:
        raise RowDropped("bad_content", f"turn {position}: none among {_shown(given)}")
    for key in turn.keys() - KNOWN[role]:
        tell(f"key {key[:40]!r} of {role} turns left out")
    made: Turn = {"role": role}
    if role == "assistant":
        made |= _answer(turn, content, position, name in CALL_ROLES, tell)
    elif calls := [key for key in CALLS if turn.get(key)]:
        raise RowDropped("bad_tool_call", f"turn {position}: {calls[0]} in a {role} turn")
    else:
        made["content"] = _content(content, position, role, tell)
    if role == "tool":
        made |= {key: str(turn[key]) for key in ("tool_call_id", "name") if key in turn}
    made |= _train(turn, role, position)
    return _apart(made, turn[RESPONSES], position, tell) if role == "assistant" and turn.get(RESPONSES) else [made]


def _apart(made: Turn, responses: Any, position: int, tell: Tell) -> list[Turn]:
    """Splits an answer whose turn also holds the responses to its calls into calls, responses and the remaining
    text.
    """
    tell("responses to calls given turns of their own")
    responses = parsed(responses, RESPONSES, tell)
    results: list[Turn] = []
    for response in (
        [responses] if isinstance(responses, dict) else responses if isinstance(responses, list) else [None]
    ):
        if not isinstance(response, dict) or "response" not in response:
            raise RowDropped("bad_tool_call", f"turn {position}: {RESPONSES}: {str(responses)[:60]}")
        name = {"name": str(response["name"])} if response.get("name") is not None else {}
        content = _content(response["response"], position, "tool", tell)
        results.append({"role": "tool", "content": content, **name})
    calls = [{**made, "content": ""}] if made.get("tool_calls") else []
    said = {key: value for key, value in made.items() if key != "tool_calls" and not (calls and key == "reasoning")}
    return [*calls, *results, *([said] if said["content"].strip() else [])]


def _shown(turn: Turn) -> str:
    return f"the keys {', '.join(map(str, turn))} (data.columns names others than role and content)"[:120]


def _taken(turn: Turn, *keys: str) -> Any:
    """Removes and returns the value of the first of these keys that is present."""
    return next((turn.pop(key) for key in keys if key in turn), None)


def _train(turn: Turn, role: str, position: int) -> Turn:
    """`{"train": …}` if the row says whether the turn carries loss."""
    if unclear := [key for key in UNCLEAR_LOSS if key in turn]:
        raise RowDropped("bad_weight", f"turn {position}: {unclear[0]} is not read; write train: false or true instead")
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
    """The text, or text parts, of a turn that the model reads."""
    if isinstance(content, str):
        return content
    parts = _text_parts(content)
    if parts is None and role == "user":
        parts = _mixed_parts(content, tell)
    if parts is not None:
        return parts
    if role == "tool" and content is not None and not _has_parts(content):
        tell("results of tools given as objects written as JSON text")
        return json.dumps(content, ensure_ascii=False)
    raise RowDropped("bad_content", f"turn {position}: {_kinds(content)}")


def _text_parts(content: Any) -> list[Turn] | None:
    """`[{"type": "text", "text": …}, …]`; None if there are parts of another type."""
    if not isinstance(content, list) or not content:
        return None
    texts = [part if isinstance(part, str) else part.get("text") if _is_text(part) else None for part in content]
    return [{"type": "text", "text": t} for t in texts] if all(isinstance(t, str) for t in texts) else None


def _mixed_parts(content: Any, tell: Tell) -> list[Turn] | None:
    """Texts and pictures; None if there are no pictures, or parts of a third type."""
    if not isinstance(content, list):
        return None
    made, pictures = [], 0
    for part in content:
        if isinstance(part, dict) and part.get("type") in IMAGE_PARTS:
            made.append({"type": IMAGE_PART, "image": _meant(part, tell)})
            pictures += 1
        elif (texts := _text_parts([part])) is not None:
            made += texts
        else:
            return None
    return made if pictures else None


def _meant(part: Turn, tell: Tell) -> Any:
    """What a part says about its picture; None: nothing."""
    key = next((key for key in IMAGE_KEYS if part.get(key)), "")
    given = part.get(key)
    if given is None and isinstance(part.get("source"), dict):  # Anthropic's; a text would say whence a picture comes
        given = part["source"]
    if isinstance(given, dict) and given.get("detail"):
        tell("detail of pictures ignored: the processor decides on the number of tokens")
    return {key: given} if key in ("base64", "bytes") else given


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_PARTS


def _has_parts(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content)


def _kinds(content: Any) -> str:
    if _has_parts(content):
        kinds = {str(part.get("type"))[:20] for part in content if isinstance(part, dict)} - set(map(str, TEXT_PARTS))
        advice = "; write calls as tool_calls, and results as tool turns" if kinds & CALL_PARTS else ""
        return f"parts of type {', '.join(sorted(kinds))}{advice}" if kinds else "a part without text"
    return "none" if content is None else type(content).__name__


def _answer(turn: Turn, content: Any, position: int, is_call: bool, tell: Tell) -> Turn:
    """Content, reasoning and calls of an assistant turn."""
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
    if TAGS.search(content):
        tell("tags of thoughts or calls left in an answer, as text")
    # The same thought under two keys (servers send both `reasoning` and `reasoning_content`) counts once.
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
    """(text, thoughts) of an answer's parts. Texts are joined unchanged, as a server returns them in one text."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in THOUGHT_KEYS:
            thoughts.append(_thought(part.get(kind, part.get("text")), kind, position))
        elif (found := _text_parts([part])) is not None:
            texts.append(found[0]["text"])
        else:
            raise RowDropped("bad_content", f"turn {position}: {_kinds(parts)}")
    tell("parts of an answer joined")
    return "".join(texts), thoughts


def _in_an_answer(content: str, at: int) -> bool:
    """Whether a closing tag at `at` is an answer's own text: it follows an opening tag, or is inside a code fence."""
    return OPENED.search(content, 0, at) is not None or content.count("```", 0, at) % 2 == 1


def take_thoughts(content: str) -> tuple[str, list[str]]:
    """(the rest of an answer, its thoughts): `<think>…</think>` (or similar tags) at the start, and every
    `<|channel>…<channel|>`.

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
    # If it is only closed, the template of the model that wrote it had opened it.
    if not at and (closed := CLOSED_ONLY.search(content)) and not _in_an_answer(content, closed.start()):
        thoughts.append(content[: closed.start()].strip())
        at = closed.end() - 1  # the line break shows that what follows it is an indent
    if at and (solution := SOLUTION.fullmatch(content, at)):
        content, at = content[: solution.end(1)], solution.start(1)
    more, rest = split_thoughts(content[at:])
    return AFTER_THOUGHT.sub("", rest) if at or rest != content else rest, [*thoughts, *more]
