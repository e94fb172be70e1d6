"""Splits the ids of an example at its control tokens: turns, texts, and blocks of tools and thoughts.

Nothing here knows a template: whatever rendered the conversation, its control tokens determine its structure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma4_tpu.data import markup
from gemma4_tpu.data.drops import RowDropped

_CLOSED_BY = {
    markup.CHANNEL: markup.CHANNEL_END,
    markup.TOOL: markup.TOOL_END,
    markup.TOOL_CALL: markup.TOOL_CALL_END,
    markup.TOOL_RESPONSE: markup.TOOL_RESPONSE_END,
    markup.IMAGE_START: markup.IMAGE_END,
}
_QUOTED_IN = (markup.TOOL, markup.TOOL_CALL, markup.TOOL_RESPONSE)
TURN_OF = {"system": ("system", "developer"), "user": ("user",), "assistant": ("model",), "tool": ("model", "tool")}
TEXT = "text"
SHOWN = 60  # characters of a text that a message quotes


@dataclass
class Stretch:
    """A run of ids between control tokens, or a block of tools or thoughts including its delimiters."""

    kind: str  # "text", the token that opens a block, or one that opens or closes a turn
    start: int
    stop: int
    texts: list[str]  # the quoted texts of a block; the role of a turn
    closed: bool = True
    owner: int | None = None  # the message that it belongs to
    soft_tokens: int = 0  # of a picture

    @property
    def space(self) -> bool:
        return self.kind == TEXT and not "".join(self.texts).strip()

    @property
    def blank(self) -> bool:
        """White space, or an empty thought: belongs to no message."""
        return self.space or (self.kind == markup.CHANNEL and "".join(self.texts).strip() in ("", "thought"))


class Splitter:
    """Splits examples made with one tokenizer.

    Args:
      control: the tokenizer's control tokens and their ids.
      bos: the id that begins every example.
      header: int32 ids that open the model's turn, after the turn token itself.
    """

    def __init__(self, control: dict[str, int], bos: int, header: np.ndarray):
        self._names = {number: name for name, number in control.items()}
        self._ids = np.array(sorted(self._names), np.int64)
        self._pattern = markup.control_pattern(control)
        self._bos = bos
        self._header = header

    def split(self, ids: np.ndarray, text: str) -> list[Stretch]:
        """The stretches of an example, in order.

        Args:
          ids: int32 [n + 1].
          text: the text that they encode.

        Raises:
          RowDropped: `bad_rendering`, the markup does not nest.
        """
        places = np.flatnonzero(np.isin(ids, self._ids))
        parts = self._pattern.split(text)
        names = [self._names[number] for number in ids[places].tolist()]
        if parts[1::2] != names:
            raise RowDropped("bad_rendering", "the token ids contain other control tokens than the text")
        if not names or ids[0] != self._bos or np.count_nonzero(ids == self._bos) != 1:
            raise RowDropped(
                "bad_rendering", f"{np.count_nonzero(ids == self._bos)} BOS tokens; expected one, at the start"
            )
        pieces: list[Stretch] = []
        role: str | None = None
        block: Stretch | None = None
        stops = [*places[1:].tolist(), len(ids)]
        for name, place, after, stop in zip(names[1:], stops[:-1], parts[4::2], stops[1:], strict=True):
            text_start = place + 1
            if block is not None:
                if name == _CLOSED_BY[block.kind]:
                    block.stop, block.closed, block = place + 1, True, None
                elif name == markup.IMAGE and block.kind == markup.IMAGE_START:
                    block.soft_tokens += 1
                    block.texts.append(after)
                    continue
                elif name == markup.QUOTE and block.kind in _QUOTED_IN:
                    block.texts.append(after)
                    continue
                else:
                    raise RowDropped("bad_rendering", f"{name} inside an open {block.kind}")
            elif name == markup.TURN and role is None:
                role, newline, after = after.partition("\n")
                if not newline:
                    raise RowDropped("bad_rendering", f"a turn without a header: {role[:SHOWN]!r}")
                if role == "model" and np.array_equal(ids[text_start : text_start + len(self._header)], self._header):
                    text_start += len(self._header)
                pieces.append(Stretch(markup.TURN, place, text_start, [role]))
            elif name == markup.TURN_END and role is not None:
                role = None
                pieces.append(Stretch(markup.TURN_END, place, place + 1, []))
            elif name in _CLOSED_BY and role is not None:
                block = Stretch(name, place, len(ids), [after], closed=False)
                pieces.append(block)
                continue
            elif name != markup.THINK or role not in TURN_OF["system"]:
                raise RowDropped("bad_rendering", f"misplaced {name}")
            if after.strip() and role is None:
                raise RowDropped("bad_rendering", f"text outside of turns: {after.strip()[:SHOWN]!r}")
            if after:
                pieces.append(Stretch(TEXT, text_start, stop, [after]))
        if parts[0] or parts[2].strip():
            raise RowDropped("bad_rendering", f"text before the first turn: {(parts[0] + parts[2])[:SHOWN]!r}")
        return pieces


def shown(piece: Stretch | None) -> str:
    """A stretch as quoted in a message; None: the example has ended."""
    if piece is None:
        return "the end"
    if piece.kind == markup.TURN:
        return f"a turn of {piece.texts[0]!r}"
    if piece.kind == markup.TURN_END:
        return "the end of the turn"
    if piece.kind == markup.IMAGE_START:
        return f"a picture of {piece.soft_tokens} tokens"
    text = repr(" ".join(text.strip() for text in piece.texts).strip()[:SHOWN])
    return text if piece.kind == TEXT else f"{piece.kind} {text}"
