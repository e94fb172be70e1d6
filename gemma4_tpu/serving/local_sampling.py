"""What one request wants, and the next token of its answer: seeds, temperature and penalties of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from gemma4_tpu.serving.local_grammar import AnswerGrammar
from gemma4_tpu.serving.local_text import AnswerText, ToolCall

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"
"""Why an answer ended; the first two as OpenAI calls them."""
GREEDY_BELOW = 1e-5
"""Temperatures under this one are 0, as in vLLM: dividing by them leaves the range of float32."""


@dataclass(frozen=True)
class AnswerSampling:
    """How one answer is drawn. Names follow vLLM."""

    max_tokens: int
    """0: none, the prompt alone is told."""
    temperature: float = 1.0
    """Under `GREEDY_BELOW`: the likeliest token, always."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    """Tokens with less than this part of the likeliest one's chance are not drawn."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer has."""
    frequency_penalty: float = 0.0
    """The same, as often as the answer has it."""
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or answer have are divided by it if positive, else multiplied."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token → what is added to its logit."""
    seed: int | None = None
    """None: another one each time."""
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    """So many likeliest tokens are told with each token; None: no log-probabilities at all."""


class TokenLogprob(NamedTuple):
    """A token's log-probability by the model alone: before bias, penalties, temperature, top_k and so on."""

    token: int
    logprob: float | None
    """None: of the first token, which nothing is before."""
    top: tuple[tuple[int, float], ...]
    offset: int = 0
    """Characters of the text before it."""


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
    calls: tuple[ToolCall, ...] = ()


@dataclass(eq=False)
class GeneratedAnswer:
    """One sequence under way: its prompt, its tokens so far, and who is told."""

    prompt: list[int]
    sampling: AnswerSampling
    tell: Callable[[AnswerPiece], None]
    """Called from the engine's thread, once per token."""
    chat: bool = False
    """Whether thoughts are told apart from the answer, as vLLM's `--reasoning-parser gemma4` does."""
    most_calls: float = 0
    """So many calls are told apart too, as its `--tool-call-parser gemma4` does, and the last one ends the answer."""
    echo: str | None = None
    """The prompt's text, told before the answer."""
    grammar: AnswerGrammar | None = None
    """What the answer has to be."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the part that is read, where both echo and log-probabilities are wanted."""
    tokens: list[int] = field(default_factory=list)
    text: AnswerText | None = None
    generator: torch.Generator | None = None
    arrived: float = 0.0
    """`time.monotonic()`"""
    last_token: float | None = None
    """When it was made; `time.monotonic()`."""
    aborted: bool = False
    """Set from any thread; the engine drops it at its next step."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are wanted."""
        return self.echo is not None and self.sampling.logprobs is not None


def choose(logits: torch.Tensor, answer: GeneratedAnswer, allowed: torch.Tensor | None = None) -> int:
    """The next token. `logits`: [V], float32. `allowed`: [V] bool, None: all. In the order of vLLM's sampler."""
    sampling = answer.sampling
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    logits = _penalised(logits, answer)
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    scaled, tokens = logits / sampling.temperature, None
    if sampling.min_p > 0:
        chances = scaled.softmax(-1)
        scaled = scaled.masked_fill(chances < sampling.min_p * chances.max(), -torch.inf)
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


def _penalised(logits: torch.Tensor, answer: GeneratedAnswer) -> torch.Tensor:
    """`logits` [V] with bias and penalties, as OpenAI and vLLM define them."""
    sampling = answer.sampling
    if sampling.logit_bias:
        logits = logits.clone()
        logits[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(logits), dtype=torch.bool)
        seen[answer.prompt + answer.tokens] = True
        penalty = torch.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits = torch.where(seen, logits * penalty, logits)
    if sampling.frequency_penalty or sampling.presence_penalty:
        counts = torch.tensor(answer.tokens, dtype=torch.long).bincount(minlength=len(logits))
        logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    return logits


def logprob(logits: torch.Tensor, token: int, count: int, offset: int = 0) -> TokenLogprob:
    """`logits`: [V], float32."""
    chances = logits.log_softmax(-1)
    values, tokens = chances.topk(min(count, len(chances)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(chances[token]), top, offset)
