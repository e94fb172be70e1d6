"""The state of one request, and the choice of its next token: per-request seeds, temperature and penalties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from gemma4_tpu.serving.local_grammar import AnswerGrammar
from gemma4_tpu.serving.local_text import AnswerText, ToolCall

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"
"""Why an answer ended; the first two as in OpenAI."""
GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0, as in vLLM: dividing by them would leave the range of float32."""


@dataclass(frozen=True)
class AnswerSampling:
    """How to draw one answer. Names follow vLLM."""

    max_tokens: int
    """0: nothing is generated, only the prompt is reported."""
    temperature: float = 1.0
    """Below `GREEDY_BELOW`, always take the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    """Tokens with less than this fraction of the most likely one's probability are not drawn."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer contains."""
    frequency_penalty: float = 0.0
    """The same, once per occurrence."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or answer are divided by it if positive, else multiplied."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token → value added to its logit."""
    seed: int | None = None
    """None: a different one each time."""
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of most likely tokens reported per token; None: no log-probabilities."""


class TokenLogprob(NamedTuple):
    """A token's log-probability under the model alone, before bias, penalties, temperature, top_k and so on."""

    token: int
    logprob: float | None
    """None for the first token, which nothing precedes."""
    top: tuple[tuple[int, float], ...]
    offset: int = 0
    """Characters of text before it."""


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
    """One sequence in progress: its prompt, its tokens so far, and its receiver."""

    prompt: list[int]
    sampling: AnswerSampling
    tell: Callable[[AnswerPiece], None]
    """Called from the engine's thread, once per token."""
    chat: bool = False
    """Separate thoughts from the answer, as vLLM's `--reasoning-parser gemma4` does."""
    most_calls: float = 0
    """Separate up to this many calls too, as its `--tool-call-parser gemma4` does; the last one ends the answer."""
    echo: str | None = None
    """The prompt's text, reported before the answer."""
    grammar: AnswerGrammar | None = None
    """Constrains the answer."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """For the part read so far, if both echo and log-probabilities are requested."""
    tokens: list[int] = field(default_factory=list)
    text: AnswerText | None = None
    generator: torch.Generator | None = None
    arrived: float = 0.0
    """`time.monotonic()`"""
    last_token: float | None = None
    """Time of the last token, by `time.monotonic()`."""
    aborted: bool = False
    """Set from any thread; the engine drops the answer at its next step."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are requested."""
        return self.echo is not None and self.sampling.logprobs is not None


def choose(logits: torch.Tensor, answer: GeneratedAnswer, allowed: torch.Tensor | None = None) -> int:
    """Draws the next token. `logits`: [V], float32. `allowed`: [V] bool, None: all. In the order of vLLM's sampler."""
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
        before = chances.cumsum(-1) - chances  # of more likely tokens
        kept = before < sampling.top_p
        kept[0] = True  # even if top_p is too small for float32
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
