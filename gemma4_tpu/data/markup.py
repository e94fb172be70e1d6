"""Gemma 4's markup: the control tokens that open and close turns, thoughts and tool blocks.

Every function is linear in the length of the text, whatever the text contains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

TURN, TURN_END = "<|turn>", "<turn|>"
THINK = "<|think|>"
CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"
TOOL, TOOL_END = "<|tool>", "<tool|>"
TOOL_CALL, TOOL_CALL_END = "<|tool_call>", "<tool_call|>"
TOOL_RESPONSE, TOOL_RESPONSE_END = "<|tool_response>", "<tool_response|>"
QUOTE = '<|"|>'
IMAGE_START, IMAGE, IMAGE_END = "<|image>", "<|image|>", "<image|>"
"""A picture: templates write `IMAGE` once; a server puts one per soft token between the other two."""

MODEL_HEADER = f"{TURN}model\n"
THOUGHT_HEADER = f"{CHANNEL}thought\n"


def thought_channel(thought: str) -> str:
    """A thought as the model writes it and the original templates render it."""
    return f"{THOUGHT_HEADER}{thought}\n{CHANNEL_END}"


def picture(soft_tokens: int) -> str:
    """A picture of `soft_tokens` soft tokens, as a server sends it to the model."""
    return f"{IMAGE_START}{IMAGE * soft_tokens}{IMAGE_END}"


_PICTURE = re.compile(f"{re.escape(IMAGE_START)}((?:{re.escape(IMAGE)})+){re.escape(IMAGE_END)}")


def pictures_in_words(text: str) -> str:
    """A text with `[picture of 256 tokens]` in place of each picture, for people."""
    return _PICTURE.sub(lambda found: f"[picture of {len(found[1]) // len(IMAGE)} tokens]", text)


def split_thoughts(text: str) -> tuple[list[str], str]:
    """(thoughts, rest): the contents of the closed channels of `text`, and the text outside them.

    The channel's name and surrounding white space are stripped from a thought; empty thoughts are omitted. A channel
    that is never closed stays in the rest, from its opening token on.
    """
    thoughts, rest, start = [], [], 0
    while (opened := text.find(CHANNEL, start)) >= 0:
        closed = text.find(CHANNEL_END, opened)
        if closed < 0:
            break
        rest.append(text[start:opened])
        thoughts.append(text[opened + len(CHANNEL) : closed].removeprefix("thought").strip())
        start = closed + len(CHANNEL_END)
    return [thought for thought in thoughts if thought], "".join([*rest, text[start:]])


def without_thoughts(text: str) -> str:
    """An answer without its thoughts, including one that is cut off."""
    return split_thoughts(text)[1].partition(CHANNEL)[0]


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """The strings that a tokenizer reads as a single control token inside other text, with their ids."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text: number for text, number in added.items() if text in special or re.fullmatch(r"<\|.*>|<.*\|>", text)}


def control_pattern(tokens: Any) -> re.Pattern[str]:
    """Matches any of `tokens`, longest first; the single group makes `split` keep them."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))})")


def strings(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys included, at any depth (without recursion)."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            pending += [*item.values(), *(key for key in item if isinstance(key, str))]
        elif isinstance(item, list | tuple):
            pending += item
