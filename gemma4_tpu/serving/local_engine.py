"""The embedded server's engine: one thread in which Gemma 4 (transformers, PyTorch) serves many requests at once.

Continuous batching: each step reads prompts of waiting requests, up to a budget of tokens, then generates one token for
every request in progress. Prompts are read one by one; afterwards their caches are batched, padded on the left, each
with its own mask and positions, so that an answer does not depend on its neighbours beyond rounding.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from gemma4_tpu.data.tokenizer import load_limited
from gemma4_tpu.serving.local_batch import DecodingBatch
from gemma4_tpu.serving.local_grammar import AnswerGrammar, Grammars
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.local_process import WorkRefused
from gemma4_tpu.serving.local_sampling import (
    ABORT,
    ERROR,
    LENGTH,
    STOP,
    AnswerPiece,
    GeneratedAnswer,
    TokenLogprob,
    choose,
    logprob,
)
from gemma4_tpu.serving.local_template import TemplateProcess
from gemma4_tpu.serving.local_text import AnswerText, GrowingText, Grown
from gemma4_tpu.templates import arguments

log = logging.getLogger(__name__)

LOADING, READY, FAILED, STOPPED = "loading", "ready", "failed", "stopped"
PROMPT_TOKENS = 1024
"""Default number of prompt tokens read per step: more would delay the answers in progress."""
SEQUENCES = 64
"""Default number of simultaneous answers."""
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling settings that a checkpoint's `generation_config.json` can provide for requests without them."""
SCORED_TOKENS = 128
"""Prompt tokens whose log-probabilities are computed per step: for this many, Gemma 4's logits take 128 MiB."""


class LocalEngine:
    """Loads a checkpoint and answers requests; every method can be called from any thread."""

    def __init__(self, folder: Path, dtype: str, metrics: Metrics, *, sequences: int | None, prompt_tokens: int | None):
        self._folder, self._dtype, self._metrics = folder, getattr(torch, dtype), metrics
        self._sequences, self._prompt_tokens = sequences or SEQUENCES, prompt_tokens or PROMPT_TOKENS
        self._lock = threading.Condition()
        self._waiting: deque[GeneratedAnswer] = deque()
        self._batch = DecodingBatch()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.tokenizer: Any = None
        self._templates: TemplateProcess | None = None
        self._grammars: Grammars | None = None
        self.template_arguments: frozenset[str] = frozenset()
        """Arguments of the chat template besides the conversation."""
        self.state = LOADING
        self.error: BaseException | None = None
        """The reason of a failure."""

    def start(self) -> None:
        """Starts the computing thread."""
        self._thread.start()

    def submit(self, answer: GeneratedAnswer) -> None:
        """Calls `answer.tell` with one piece per token, the last one with `finish`."""
        with self._lock:
            if self.state != READY:
                answer.tell(AnswerPiece("", (), ERROR, error=f"the engine is {self.state}"))
                return
            answer.arrived = time.monotonic()
            self._waiting.append(answer)
            self._lock.notify()

    def stop(self, *, wait: bool = True) -> None:
        """Ends every answer in progress and waits for the thread, if it was started.

        With `wait=False` a checkpoint that is being loaded is left to itself: it ends with the process, and until then
        starts nothing.
        """
        with self._lock:
            loading = self.state == LOADING
            if self.state != FAILED:
                self.state = STOPPED
            self._lock.notify()
        self._end_processes()
        if self._thread.ident is not None and (wait or not loading):
            self._thread.join()

    def _end_processes(self) -> None:
        if self._templates is not None:
            self._templates.close()
        if self._grammars is not None:
            self._grammars.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of answers (in progress, waiting)."""
        return len(self._batch.answers), len(self._waiting)

    def _run(self) -> None:
        try:
            self._load()
            with torch.inference_mode():
                while self._wait():
                    self._step()
            self._end_all(ABORT, "the server is stopped")
        except BaseException as error:
            self.error = error
            log.error("the engine failed: %s", error or repr(error))
            self._end_all(ERROR, f"the engine failed: {error or repr(error)}", state=FAILED)
        finally:
            self._end_processes()  # which loading may have started after it was stopped

    def _load(self) -> None:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # on a busy machine, two threads wait for each other
        tokenizer = load_limited(str(self._folder), str(self._folder))
        model = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=self._dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self._model = model.eval()
        eos = self._model.generation_config.eos_token_id
        self._eos = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self.take_tokenizer(tokenizer)
        with self._lock:
            if self.state == LOADING:
                self.state = READY

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Sets the checkpoint's own tokenizer, with its chat template."""
        self.tokenizer = tokenizer
        self._grammars = Grammars(tokenizer, self.vocabulary, self._eos)
        if tokenizer.chat_template is not None:
            template = tokenizer.get_chat_template()
            self.template_arguments = arguments(template)
            self._templates = TemplateProcess(template, tokenizer.special_tokens_map)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], options: Mapping[str, Any], characters: int
    ) -> list[int]:
        """Tokens of a conversation.

        Args:
          messages: for the chat template.
          tools: that the model can call, in OpenAI's format.
          options: some of `template_arguments`.
          characters: limit for the rendered text.

        Raises:
          WorkRefused: the template refuses the conversation, or there is none.
        """
        if self._templates is None:
            raise WorkRefused("the checkpoint has none")
        text = self._templates.render(messages, tools, options, characters=characters)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def grammar(self, schema: Mapping[str, Any] | bool) -> AnswerGrammar:
        """A grammar for answers in JSON of this schema; raises `WorkRefused`."""
        assert self._grammars is not None  # the engine is ready
        return self._grammars.of_schema(schema)

    @property
    def defaults(self) -> dict[str, float]:
        """Sampling settings from the checkpoint's `generation_config.json`, which vLLM also applies."""
        config = self._model.generation_config
        found = {name: getattr(config, name, None) for name in DEFAULTS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def vocabulary(self) -> int:
        return self._model.get_input_embeddings().num_embeddings

    def _wait(self) -> bool:
        """Waits for work; False: stop."""
        with self._lock:
            while self.state == READY and not self._waiting and not self._batch.answers:
                self._lock.wait()
            return self.state == READY

    def _step(self) -> None:
        self._drop(lambda answer: answer.aborted)
        budget = self._prompt_tokens
        while budget > 0 and len(self._batch.answers) < self._sequences and (answer := self._next()):
            budget -= self._read(answer, budget)
        if self._batch.answers:
            self._decode()
        self._metrics.under_way(*self.counts)

    def _next(self) -> GeneratedAnswer | None:
        with self._lock:
            return self._waiting[0] if self._waiting else None

    def _read(self, answer: GeneratedAnswer, budget: int) -> int:
        """Reads up to `budget` tokens of the prompt, and generates the first token at its end. Returns the
        number read.
        """
        cache = self._partial if self._partial is not None and answer is self._partial_of else DynamicCache()
        start = cache.get_seq_length()
        end = min(len(answer.prompt), start + (min(budget, SCORED_TOKENS) if answer.scores_prompt else budget))
        keep = 0 if answer.scores_prompt else 1
        logits = self._forward([answer.prompt[start:end]], cache, [start], torch.ones(1, end, dtype=torch.long), keep)
        if answer.scores_prompt:
            self._score(answer, logits[0], start)
        self._partial, self._partial_of = (cache, answer) if end < len(answer.prompt) else (None, None)
        if self._partial is None:
            # Leaves the queue only once its prompt is read: until then, `_next`, `_drop` and `_end_all` find it there.
            finish = self._add(answer, logits[0, -1])
            with self._lock:
                self._waiting.popleft()
            if finish is None:
                self._batch.join(answer, cache)
        return end - start

    def _score(self, answer: GeneratedAnswer, logits: torch.Tensor, start: int) -> None:
        """Scores the prompt's own tokens after those whose logits [T, V] are given; `start`: position of the first."""
        count = answer.sampling.logprobs or 0
        told = answer.prompt_logprobs or [TokenLogprob(answer.prompt[0], None, ())]
        told += [logprob(row, token, count) for row, token in zip(logits, answer.prompt[start + 1 :], strict=False)]
        answer.prompt_logprobs = told

    def _begin(self, answer: GeneratedAnswer) -> AnswerPiece | None:
        """Called when the prompt is read. Reports it if requested; returns it if nothing else is wanted."""
        self._metrics.read(answer)
        chat = answer.prompt if answer.chat else None
        answer.text = AnswerText(self.tokenizer, answer.sampling.stop, chat, most_calls=answer.most_calls)
        seed = answer.sampling.seed
        answer.generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        piece = AnswerPiece(answer.echo or "", (), logprobs=tuple(self._placed(answer)))
        if not answer.sampling.max_tokens:
            self._metrics.ended(answer, LENGTH)
            return replace(piece, finish=LENGTH)
        if answer.echo is not None:
            answer.tell(piece)
        return None

    def _placed(self, answer: GeneratedAnswer) -> Iterator[TokenLogprob]:
        """The prompt's tokens with their offsets in its text, which excludes the start token."""
        text = GrowingText(self.tokenizer, control=True)
        for place, one in enumerate(answer.prompt_logprobs):
            yield one._replace(offset=text.length)
            if place or one.token != self.tokenizer.bos_token_id:
                text.add(one.token)

    _partial: DynamicCache | None = None
    """Cache of the first waiting answer, whose prompt is only partly read."""
    _partial_of: GeneratedAnswer | None = None

    def _decode(self) -> None:
        """Generates one token for every answer of the batch."""
        batch = self._batch
        tokens = [[answer.tokens[-1]] for answer in batch.answers]
        logits = self._forward(tokens, batch.cache, [a.length - 1 for a in batch.answers], batch.mask())
        ended = {id(a) for a, row in zip(batch.answers, logits[:, -1], strict=True) if self._add(a, row) is not None}
        batch.keep([row for row, answer in enumerate(batch.answers) if id(answer) not in ended])

    def _forward(
        self, tokens: Sequence[Sequence[int]], cache: DynamicCache, starts: Sequence[int], mask: torch.Tensor,
        keep: int = 1,
    ) -> torch.Tensor:  # fmt: skip
        """Logits after the last `keep` tokens (0: all), [B, keep, V] in float32. `mask`: [B, cached + new tokens]."""
        ids = torch.tensor(tokens)  # [B, T]
        positions = torch.tensor(starts)[:, None] + torch.arange(ids.shape[1])
        found = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=keep,
        )  # fmt: skip
        return found.logits.float()

    def _add(self, answer: GeneratedAnswer, logits: torch.Tensor) -> str | None:
        """Draws and reports a token, after the prompt if it is the first; returns why the answer ended, if it did.

        A failure of one answer ends only that answer.
        """
        try:
            piece = (self._begin(answer) if answer.text is None else None) or self._drawn(answer, logits)
        except Exception as error:
            log.exception("an answer failed")
            self._metrics.ended(answer, ERROR)
            piece = AnswerPiece("", (), ERROR, error=f"the answer failed: {error or repr(error)}")
        answer.tell(piece)
        return piece.finish

    def _drawn(self, answer: GeneratedAnswer, logits: torch.Tensor) -> AnswerPiece:
        """Draws the next token, and decodes what it adds."""
        sampling, text = answer.sampling, answer.text
        assert text is not None
        grammar = None if text.is_apart else answer.grammar
        token = choose(logits, answer, torch.from_numpy(grammar.allowed(text.openers)) if grammar else None)
        if grammar and token not in text.openers:
            grammar.take(token)
        answer.tokens.append(token)
        place = len(answer.echo or "") + text.length
        is_end = token in self._eos and not sampling.ignore_eos
        grown = Grown() if is_end else text.add(token)
        finish = None
        if is_end or token in sampling.stop_token_ids or text.stopped or (grammar and grammar.is_over):
            finish = STOP
        elif len(answer.tokens) >= sampling.max_tokens:
            finish = LENGTH
        if finish:
            grown = grown.followed_by(text.end())
            finish = STOP if text.stopped else finish
        chances = () if sampling.logprobs is None else (logprob(logits, token, sampling.logprobs, place),)
        self._metrics.token(answer, finish)
        return AnswerPiece(grown.text, (token,), finish, chances, reasoning=grown.reasoning, calls=grown.calls)

    def _drop(self, wanted: Callable[[GeneratedAnswer], bool]) -> None:
        """Ends answers that nobody waits for."""
        with self._lock:
            gone = [answer for answer in self._waiting if wanted(answer)]
            self._waiting = deque(answer for answer in self._waiting if not wanted(answer))
        gone += [answer for answer in self._batch.answers if wanted(answer)]
        if any(answer is self._partial_of for answer in gone):
            self._partial = self._partial_of = None
        self._batch.keep([row for row, answer in enumerate(self._batch.answers) if not wanted(answer)])
        for answer in gone:
            self._metrics.ended(answer, ABORT)
            answer.tell(AnswerPiece("", (), ABORT))

    def _end_all(self, finish: str, error: str, state: str | None = None) -> None:
        with self._lock:
            self.state = state or self.state
            left = [*self._batch.answers, *self._waiting]
            self._waiting.clear()
            self._batch = DecodingBatch()
        for answer in left:
            self._metrics.ended(answer, finish)
            answer.tell(AnswerPiece("", (), finish, error=error))
        self._metrics.under_way(0, 0)
