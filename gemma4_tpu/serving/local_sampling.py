"""What one request wants, and the next token of its answer: seeds of its own, text as it grows, stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gemma4_tpu.data.markup import CHANNEL, CHANNEL_END

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"
"""Why an answer ended; the first two as OpenAI calls them."""
GREEDY_BELOW = 1e-5
"""Temperatures under this one are 0, as in vLLM: dividing by them leaves the range of float32."""
THOUGHT_NAME = "thought\n"
"""What a thought channel begins with."""
_UNFINISHED = "\ufffd"  # what a tokenizer makes of half a character


@dataclass(frozen=True)
class AnswerSampling:
    """How one answer is drawn. Names follow vLLM."""

    max_tokens: int
    temperature: float = 1.0
    """Under `GREEDY_BELOW`: the likeliest token, always."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    seed: int | None = None
    """None: another one each time."""
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    """So many likeliest tokens are told with each token; None: no log-probabilities at all."""


class TokenLogprob(NamedTuple):
    """A token's log-probability by the model, before temperature, top_k and top_p."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class AnswerPiece:
    """What one step of the engine added to an answer."""

    text: str
    tokens: tuple[int, ...]
    finish: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None
    reasoning: str = ""
    """Text of a thought."""


@dataclass(eq=False)
class GeneratedAnswer:
    """One sequence under way: its prompt, its tokens so far, and who is told."""

    prompt: list[int]
    sampling: AnswerSampling
    tell: Callable[[AnswerPiece], None]
    """Called from the engine's thread, once per token."""
    chat: bool = False
    """Whether thoughts are told apart from the answer, as vLLM's `--reasoning-parser gemma4` does."""
    tokens: list[int] = field(default_factory=list)
    text: AnswerText | None = None
    generator: torch.Generator | None = None
    arrived: float = 0.0
    """`time.monotonic()`"""
    first_token: float | None = None
    aborted: bool = False
    """Set from any thread; the engine drops it at its next step."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


class GrowingText:
    """Tokens to text, piece by piece; what may yet become a stop string is held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._decode = tokenizer.decode
        self._stop = stop
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._tokens: list[int] = []
        self._start = self._read = 0  # the tokens from `_start` on are decoded together, those up to `_read` are told
        self._text = ""  # not told yet
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now; `stopped` where a stop string ended it."""
        self._tokens.append(token)
        # A token by itself may decode otherwise than in its place (half a character, a space that only stands between
        # words), so the last ones are decoded with and without it, and the difference is what it adds.
        known = self._plain(self._tokens[self._start : self._read])
        grown = self._plain(self._tokens[self._start :])
        if len(grown) > len(known) and not grown.endswith(_UNFINISHED):
            self._take(grown[len(known) :])
            self._start, self._read = self._read, len(self._tokens)
        return self._told(self._hold)

    def end(self) -> str:
        """The rest."""
        if not self.stopped:
            known = self._plain(self._tokens[self._start : self._read])
            self._take(self._plain(self._tokens[self._start :])[len(known) :])
        return self._told(0)

    def _plain(self, tokens: list[int]) -> str:
        return self._decode(tokens, skip_special_tokens=True)

    def _take(self, text: str) -> None:
        self._text += text
        places = [place for stop in self._stop if (place := self._text.find(stop)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True

    def _told(self, hold: int) -> str:
        end = len(self._text) if self.stopped else max(0, len(self._text) - hold)
        told, self._text = self._text[:end], self._text[end:]
        return told


class AnswerText:
    """An answer's tokens to text; in a chat, what stands in thought channels is told as reasoning.

    Args:
      tokenizer: the checkpoint's own.
      stop: texts that end the answer; thoughts are not searched for them.
      prompt: the ids before the answer, for a thought that they leave open; None: nothing is told apart.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt: Sequence[int] | None = None):
        self._make = lambda: GrowingText(tokenizer, ())
        self._answer = GrowingText(tokenizer, stop)
        self._opens, self._closes = tokenizer.convert_tokens_to_ids([CHANNEL, CHANNEL_END])
        self._apart = prompt is not None
        self._thought: GrowingText | None = None
        self._named = False  # whether the channel's name is behind us
        self._held = ""  # of the thought, not told yet
        marks = [token for token in prompt or () if token in (self._opens, self._closes)]
        if marks and marks[-1] == self._opens:
            self._thought, self._named = self._make(), True  # the prompt wrote the name, too

    @property
    def stopped(self) -> bool:
        return self._answer.stopped

    def add(self, token: int) -> tuple[str, str]:
        """(answer, reasoning) that are certain now."""
        if self._apart and token == self._opens:
            self._thought, self._named = self._make(), False
        elif self._thought is not None and token == self._closes:
            return "", self._end_thought()
        elif self._thought is not None:
            return "", self._told(self._thought.add(token))
        else:
            return self._answer.add(token), ""
        return "", ""

    def end(self) -> tuple[str, str]:
        """The rest."""
        reasoning = self._end_thought() if self._thought is not None else ""
        return self._answer.end(), reasoning

    def _end_thought(self) -> str:
        assert self._thought is not None
        rest = self._told(self._thought.end()) + self._held
        self._thought, self._held = None, ""
        return (rest if self._named else rest.removeprefix(THOUGHT_NAME.strip())).removesuffix("\n")

    def _told(self, text: str) -> str:
        """What of a thought is certain: not its channel's name, nor a line end, which may be the last."""
        text = self._held + text
        if not self._named and THOUGHT_NAME.startswith(text):
            told = ""
        else:
            text = text if self._named else text.removeprefix(THOUGHT_NAME)
            self._named, told = True, text.removesuffix("\n")
        self._held = text[len(told) :]
        return told


def choose(logits: torch.Tensor, answer: GeneratedAnswer) -> int:
    """The next token. `logits`: [V], float32."""
    sampling = answer.sampling
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    scaled, tokens = logits / sampling.temperature, None
    if 0 < sampling.top_k < len(scaled):
        scaled, tokens = scaled.topk(sampling.top_k)
    elif sampling.top_p < 1:
        scaled, tokens = scaled.sort(descending=True)
    chances = scaled.softmax(-1)
    if sampling.top_p < 1:
        before = chances.cumsum(-1) - chances  # of likelier tokens
        kept = before < sampling.top_p
        kept[0] = True  # also where top_p is too small for float32
        chances = torch.where(kept, chances, 0.0)
    drawn = int(torch.multinomial(chances, 1, generator=answer.generator))
    return drawn if tokens is None else int(tokens[drawn])


def logprob(logits: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """`logits`: [V], float32."""
    chances = logits.log_softmax(-1)
    values, tokens = chances.topk(min(count, len(chances)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(chances[token]), top)
