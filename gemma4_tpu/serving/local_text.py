"""Decodes an answer's tokens to text as it grows: finds stop strings and, in a chat, thoughts and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gemma4_tpu.data.calls import read_call
from gemma4_tpu.data.markup import CHANNEL, CHANNEL_END, THINK, TOOL_CALL, TOOL_CALL_END, TOOL_RESPONSE

THOUGHT_NAME = "thought\n"
"""Start of a thought channel."""
_UNFINISHED = "\ufffd"  # what a tokenizer decodes half of a character to


class ToolCall(NamedTuple):
    """A call that a model made."""

    name: str
    arguments: dict[str, Any]


class Grown(NamedTuple):
    """The part of an answer that became final since the last report."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()

    def followed_by(self, more: Grown) -> Grown:
        """Concatenates both."""
        return Grown(self.text + more.text, self.reasoning + more.reasoning, self.calls + more.calls)


class GrowingText:
    """Decodes tokens piece by piece; holds back what could still become a stop string.

    Args:
      tokenizer: the checkpoint's own.
      stop: texts that end it.
      control: whether control tokens are part of the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, control: bool = False):
        self._decode, self._control = tokenizer.decode, control
        self._stop = stop
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._tokens: list[int] = []
        self._start = self._read = 0  # decode from `_start` on; those before `_read` are reported
        self._text = ""  # not reported yet
        self.length = 0
        """Characters so far, including those held back."""
        self.stopped = False

    def add(self, token: int) -> str:
        """Returns the text that is now final; sets `stopped` if a stop string ended it."""
        self._tokens.append(token)
        # A token can decode differently by itself (half of a character, a space that only appears between words), so
        # the last ones are decoded with and without it, and the difference is what it adds.
        known = self._plain(self._tokens[self._start : self._read])
        grown = self._plain(self._tokens[self._start :])
        if len(grown) > len(known) and not grown.endswith(_UNFINISHED):
            self._take(grown[len(known) :])
            self._start, self._read = self._read, len(self._tokens)
        return self._told(self._hold)

    def end(self) -> str:
        """Returns the rest."""
        if not self.stopped:
            known = self._plain(self._tokens[self._start : self._read])
            self._take(self._plain(self._tokens[self._start :])[len(known) :])
        return self._told(0)

    def insert(self, text: str) -> str:
        """Returns the text that is now final, after text that was not decoded here."""
        rest = self.end()
        self._tokens, self._start, self._read = [], 0, 0
        self._take("" if self.stopped else text)
        return rest + self._told(self._hold)

    def _plain(self, tokens: list[int]) -> str:
        return self._decode(tokens, skip_special_tokens=not self._control)

    def _take(self, text: str) -> None:
        self._text += text
        self.length += len(text)
        places = [place for stop in self._stop if (place := self._text.find(stop)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True

    def _told(self, hold: int) -> str:
        end = len(self._text) if self.stopped else max(0, len(self._text) - hold)
        told, self._text = self._text[:end], self._text[end:]
        return told


class AnswerText:
    """Decodes an answer's tokens; in a chat, separates thought channels as reasoning, and calls as calls.

    Args:
      tokenizer: the checkpoint's own.
      stop: texts that end the answer; thoughts and calls are not searched for them.
      prompt: the ids before the answer, which can leave a thought open; None: nothing is separated.
      most_calls: the number of tool calls after which the answer ends; 0: there are no tools, and no calls are
        separated.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], prompt: Sequence[int] | None = None, *, most_calls: float = 0
    ):
        self._tokenizer = tokenizer
        self._answer = GrowingText(tokenizer, stop)
        self._opens, self._closes, thinks = _ids(tokenizer, CHANNEL, CHANNEL_END, THINK)
        calls: list[int | None] = [None] * 3
        if most_calls:
            calls = _ids(tokenizer, TOOL_CALL, TOOL_CALL_END, TOOL_RESPONSE)
        self._calls, self._called, self._response = calls
        self._apart = prompt is not None
        self._thought: GrowingText | None = None
        self._call: list[int] | None = None
        self._named = False  # whether the channel's name has been read
        self._held = ""  # part of the thought, not reported yet
        self._calls_left, self._has_called, self._responds = most_calls, False, False
        given = list(prompt or ())
        channels = [token for token in given if token in (self._opens, self._closes)]
        if channels and channels[-1] == self._opens:
            self._thought, self._named = GrowingText(tokenizer), True  # the prompt contains the name, too
        thinking = self._apart and thinks in given and given[-1] != self._closes
        self._openers = [mark for mark in (self._opens if thinking else None, self._calls) if mark is not None]

    @property
    def stopped(self) -> bool:
        """Ended by a stop string, by the last call, or where a response would begin, which the model must not write."""
        return self._answer.stopped or self._responds

    @property
    def length(self) -> int:
        """Characters of the answer so far."""
        return self._answer.length

    @property
    def is_apart(self) -> bool:
        """Whether what follows is not the answer's text: inside a thought, inside a call, or after a call."""
        return self._thought is not None or self._call is not None or self._has_called

    @property
    def openers(self) -> list[int]:
        """Tokens that can begin a thought or a call instead of the answer, before any text of the answer."""
        return [] if self._answer.length else self._openers

    def add(self, token: int) -> Grown:
        """Returns what is now final."""
        if self._call is not None:
            self._call.append(token)
            return self._end_call() if token == self._called else Grown()
        if self._thought is not None and token != self._opens:
            return Grown(
                reasoning=self._end_thought() if token == self._closes else self._told(self._thought.add(token))
            )
        if self._apart and token == self._opens:
            self._thought, self._named = GrowingText(self._tokenizer), False
        elif token == self._calls:
            self._call = [token]
        elif token == self._response:
            self._responds = True
        else:
            return Grown(self._answer.add(token))
        return Grown()

    def end(self) -> Grown:
        """Returns the rest."""
        reasoning = self._end_thought() if self._thought is not None else ""
        begun = self._end_call() if self._call is not None else Grown()
        return Grown(begun.text + self._answer.end(), reasoning, begun.calls)

    def _end_call(self) -> Grown:
        """Reports a malformed or truncated call as it was written."""
        written = self._tokenizer.decode(self._call, skip_special_tokens=False)
        self._call = None
        try:
            call = read_call(written.removeprefix(TOOL_CALL).removesuffix(TOOL_CALL_END))
        except ValueError:
            return Grown(self._answer.insert(written))
        self._has_called, self._calls_left = True, self._calls_left - 1
        self._responds = self._responds or not self._calls_left
        return Grown(calls=(ToolCall(*call),))

    def _end_thought(self) -> str:
        assert self._thought is not None
        rest = self._told(self._thought.end()) + self._held
        self._thought, self._held = None, ""
        return (rest if self._named else rest.removeprefix(THOUGHT_NAME.strip())).removesuffix("\n")

    def _told(self, text: str) -> str:
        """The part of a thought that is final: without its channel's name, and without a line end that could be the
        last.
        """
        text = self._held + text
        if not self._named and THOUGHT_NAME.startswith(text):
            told = ""
        else:
            text = text if self._named else text.removeprefix(THOUGHT_NAME)
            self._named, told = True, text.removesuffix("\n")
        self._held = text[len(told) :]
        return told


def _ids(tokenizer: Any, *marks: str) -> list[int | None]:
    """Ids of control tokens; None for one that the tokenizer lacks."""
    found = tokenizer.convert_tokens_to_ids(list(marks))
    there = tokenizer.convert_ids_to_tokens([0 if token is None else token for token in found])
    return [token if name == mark else None for mark, token, name in zip(marks, found, there, strict=True)]
