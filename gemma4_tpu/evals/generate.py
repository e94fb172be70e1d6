"""Generates completions with a model in this process: base and adapters, many samples per decoding step.

Requests are sorted by prompt length, so batches have little padding, and all batches of one length have the same static
shape and share a compilation. A sample's draws depend only on its own seed, whatever else is in its batch.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from gemma4_tpu.checkpoint_folder import GENERATION_NAME
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.data.chat import ChatFormat, Message
from gemma4_tpu.data.hard_limit import at
from gemma4_tpu.data.markup import TURN_END, pictures_in_words, without_thoughts
from gemma4_tpu.data.picture_cache import Shown
from gemma4_tpu.data.pictures import pictures_of
from gemma4_tpu.data.seen import Sight
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.likelihood import answer_logprobs
from gemma4_tpu.evals.problems import Asked
from gemma4_tpu.evals.store import LENGTH, STOP, Sample
from gemma4_tpu.models import sharding
from gemma4_tpu.models.base import Base
from gemma4_tpu.models.decode import Sampling, generate
from gemma4_tpu.models.gemma4 import Model
from gemma4_tpu.storage import join, list_folder, read_json

log = logging.getLogger(__name__)

TPU_PROMPT_MULTIPLE, PROMPT_MULTIPLE = 128, 32
"""Prompts are padded to a multiple of this many tokens (on TPUs, one that the attention kernel accepts); each length
compiles once.
"""

ANSWER_MULTIPLE = 8
"""The longest scored answer is padded to a multiple of this many tokens."""


@dataclass(frozen=True)
class SampleRequest:
    """A sample to draw."""

    problem: str
    sample: int
    messages: tuple[Message, ...]
    seed: int
    tools: tuple[Any, ...] | None = None
    """Functions that the model can call, as JSON schemas."""
    scored: tuple[str, ...] = ()
    """Answers whose likelihoods are requested, instead of a drawn answer."""


class Backend(Protocol):
    """A source of completions."""

    @property
    def description(self) -> dict[str, Any]:
        """Model and parameters, for the report."""

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[Sample]:
        """Yields the samples in any order; one that cannot be obtained is logged and omitted.

        Raises:
          UserError: the requests need scoring, which this backend does not support.
        """

    def example(self, request: SampleRequest) -> str:
        """The prompt of a request as the model sees it, for the report."""


def requests(problems: Sequence[Asked], config: EvalConfig) -> list[SampleRequest]:
    """All samples of an evaluation. Raises: UserError: both `eval.system` and a problem have a system message."""
    return [
        SampleRequest(
            problem.name, i, messages(problem, config), sample_seed(config.seed, problem.name, i), problem.tools,
            problem.scored,
        )
        for problem in problems
        for i in range(config.n)
    ]  # fmt: skip


def messages(problem: Asked, config: EvalConfig) -> tuple[Message, ...]:
    """The conversation to answer."""
    if not config.system:
        return problem.messages
    if problem.messages[0]["role"] == "system":
        raise UserError(f"eval.system: problem {problem.name} has its own system message; leave one of them out")
    return ({"role": "system", "content": config.system}, *problem.messages)


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """A sample's own seed, below 2**31 (the limit of servers)."""
    return zlib.crc32(f"{seed}/{problem}/{sample}".encode()) >> 1


@dataclass(frozen=True)
class Weights:
    """A model in memory."""

    model: Model
    params: Any
    lora: Any
    """Adapters; None: the base alone."""


class _ScoredRow(NamedTuple):
    """A prompt with one of the answers to be scored."""

    request: int
    """Its index among the requests."""
    ids: np.ndarray
    answer: int
    """Number of the answer's tokens, at the end of `ids`."""


class InProcess:
    """Generates with weights on this process's devices."""

    def __init__(
        self, weights: Weights, tokenizer: Any, stop_ids: Sequence[int], config: EvalConfig, policy: str,
        description: dict[str, Any], sight: Sight, whole: bool = False,
    ):  # fmt: skip
        """Args:
        weights: model, base and adapters.
        tokenizer: the checkpoint's own.
        stop_ids: tokens that end an answer.
        config: sampling and batch size.
        policy: policy for thoughts, as in training (`drop` or `train`).
        description: what the report says about the model.
        sight: how pictures in prompts are read.
        whole: whether answers keep their thoughts and control tokens.
        """
        self._whole, self._sight = whole, sight
        self._weights, self._tokenizer, self._stop_ids = weights, tokenizer, tuple(stop_ids)
        self._chat, self._policy = ChatFormat(tokenizer, policy), policy
        self._config = config
        self.description = description

    def example(self, request: SampleRequest) -> str:
        """See `Backend`."""
        (request,) = self._read([request])
        return pictures_in_words(rendered(self._chat, request))

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[Sample]:
        """See `Backend`."""
        requests = self._read(requests)
        shown = self._sight.shown([request.messages for request in requests])
        by_problem = {request.problem: rendered(self._chat, request) for request in requests}
        encoded = dict(zip(by_problem, self._chat.encode(list(by_problem.values())), strict=True))
        if scored := [request for request in requests if request.scored]:
            yield from self._score(scored, encoded, shown)
        if drawn := [request for request in requests if not request.scored]:
            yield from self._draw(drawn, [encoded[request.problem] for request in drawn], shown)

    def _read(self, requests: Sequence[SampleRequest]) -> list[SampleRequest]:
        """The requests with their pictures loaded."""
        given = {request.problem: request.messages for request in requests}
        read = dict(zip(given, self._sight.read(list(given.values())), strict=True))
        return [replace(request, messages=read[request.problem]) for request in requests]

    def _draw(
        self, requests: Sequence[SampleRequest], ids: Sequence[np.ndarray], shown: Shown | None
    ) -> Iterator[Sample]:
        """Yields drawn samples, batch by batch."""
        order = sorted(range(len(requests)), key=lambda i: (len(ids[i]), requests[i].problem, requests[i].sample))
        size = min(self._config.batch_size, -(-len(requests) // self._rows) * self._rows)
        tokens, started = 0, time.perf_counter()
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for sample in self._batch([requests[i] for i in batch], [ids[i] for i in batch], size, shown):
                tokens += sample.tokens or 0
                yield sample
            seconds = time.perf_counter() - started
            log.info(
                "%d of %d samples, %d tokens in %.1f s (%.0f tokens/s, compilation included)",
                min(start + size, len(order)), len(order), tokens, seconds, tokens / seconds,
            )  # fmt: skip

    def _score(
        self, requests: Sequence[SampleRequest], encoded: Mapping[str, np.ndarray], shown: Shown | None
    ) -> Iterator[Sample]:
        """Yields samples with the log-probability of each answer given its encoded prompt."""
        if self._policy == "train":
            raise UserError(
                "eval.thoughts=train: likelihoods are those of answers without thoughts; give eval.thoughts=drop, or"
                " eval.answers.choose=letter"
            )
        answers = [answer_ids(self._chat, request.scored) for request in requests]
        rows = [
            _ScoredRow(i, np.concatenate([encoded[requests[i].problem], own]), len(own))
            for i in sorted(range(len(requests)), key=lambda i: len(encoded[requests[i].problem]))
            for own in answers[i]
        ]
        size = min(self._config.batch_size, -(-len(rows) // self._rows) * self._rows)
        found: dict[int, list[dict[str, float]]] = {}
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            filled = [batch[min(row, len(batch) - 1)] for row in range(size)]
            logprobs = self._logprobs(filled, _keys([requests[row.request] for row in filled]), shown)
            for row, logprob in zip(batch, logprobs, strict=False):
                choices = found.setdefault(row.request, [])
                choices.append({"logprob": float(logprob), "tokens": row.answer})
                if len(choices) == len(requests[row.request].scored):
                    yield scored_sample(requests[row.request], choices)
            log.info("%d of %d answers scored", min(start + size, len(rows)), len(rows))

    def _logprobs(self, rows: Sequence[_ScoredRow], keys: list[list[str]], shown: Shown | None) -> np.ndarray:
        """Log-probabilities, float32 [rows]; `keys`: those of each row's pictures."""
        width = padded_width([row.ids for row in rows])
        longest = max(row.answer for row in rows)
        most = min(-(-longest // ANSWER_MULTIPLE) * ANSWER_MULTIPLE, width - 1)
        tokens = np.zeros((len(rows), width), np.int32)
        for place, row in enumerate(rows):
            tokens[place, width - len(row.ids) :] = row.ids
        lengths, answers = (np.array(x, np.int32) for x in zip(*((len(r.ids), r.answer) for r in rows), strict=True))
        weights = self._weights
        given = (on_mesh(x, weights.model.mesh) for x in (tokens, lengths, answers))
        features = self._features(tokens, keys, shown)
        return np.asarray(
            answer_logprobs(weights.model, weights.params, weights.lora, *given, most=most, features=features)
        )

    def _features(self, tokens: np.ndarray, keys: list[list[str]], shown: Shown | None) -> jax.Array | None:
        """Features [B, P, I] of the pictures in tokens [B, P]; None if there are none."""
        return None if shown is None else on_mesh(shown.of_rows(tokens, keys), self._weights.model.mesh)

    @property
    def _rows(self) -> int:
        """Batch sizes are a multiple of this."""
        mesh = self._weights.model.mesh
        return sharding.row_places(mesh) if mesh is not None else 1

    def _batch(
        self, requests: Sequence[SampleRequest], ids: Sequence[np.ndarray], size: int, shown: Shown | None
    ) -> Iterator[Sample]:
        """The samples of at most `size` requests, padded with repeats of the last."""
        width = padded_width(ids)
        rows = [min(row, len(requests) - 1) for row in range(size)]
        tokens = np.zeros((size, width), np.int32)
        for row, i in enumerate(rows):
            # Padded on the left: every row's next token is in the same column, so one write to the cache suffices.
            tokens[row, width - len(ids[i]) :] = ids[i]
        features = self._features(tokens, _keys([requests[i] for i in rows]), shown)
        lengths = np.array([len(ids[i]) for i in rows], np.int32)
        seeds = np.array([requests[i].seed for i in rows], np.uint32)
        weights, config = self._weights, self._config
        given = (on_mesh(x, weights.model.mesh) for x in (tokens, lengths, seeds))
        made = generate(
            weights.model, weights.params, weights.lora, *given,
            max_new_tokens=config.max_new_tokens, sampling=Sampling(config.temperature, config.top_p),
            stop_ids=self._stop_ids, features=features,
        )  # fmt: skip
        out, counts, stopped = (np.asarray(x) for x in made)
        answers = [out[row, : counts[row] - int(stopped[row])] for row in range(len(requests))]
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for row, (request, text) in enumerate(zip(requests, texts, strict=True)):
            answer = text if self._whole else visible(text, self._tokenizer)
            yield Sample(
                problem=request.problem, sample=request.sample, completion=answer, seed=request.seed,
                finish=STOP if stopped[row] else LENGTH, tokens=int(counts[row]),
            )  # fmt: skip


def _keys(requests: Sequence[SampleRequest]) -> list[list[str]]:
    """Keys of each request's pictures, in order."""
    return [[picture.key for picture in pictures_of(request.messages)] for request in requests]


def rendered(chat: ChatFormat, request: SampleRequest) -> str:
    """The prompt of a request. Raises: UserError: it can't be rendered; names the problem."""
    try:
        with at(f"problem {request.problem}"):
            return chat.render_prompt(list(request.messages), list(request.tools) if request.tools else None)
    except UserError as refusal:
        raise UserError(f"problem {request.problem}: {refusal}") from None


def answer_ids(chat: ChatFormat, answers: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each answer as in training, including the end of the turn: without it, an answer that is a prefix of
    another would always be the more likely of the two.
    """
    return chat.encode([answer + TURN_END for answer in answers])


def scored_sample(request: SampleRequest, choices: list[dict[str, float]]) -> Sample:
    """The most likely of the scored answers, with the likelihoods of all."""
    best = max(range(len(choices)), key=lambda i: choices[i]["logprob"])
    return Sample(
        problem=request.problem, sample=request.sample, completion=request.scored[best], choices=choices, tokens=0,
    )  # fmt: skip


def on_mesh(x: np.ndarray, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Puts an array of rows on the mesh, split across devices if there are enough rows."""
    if mesh is None:
        return jax.numpy.asarray(x)
    spec = jax.sharding.PartitionSpec(sharding.ROWS if x.shape[0] % sharding.row_places(mesh) == 0 else None)
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))


def visible(text: str, tokenizer: Any) -> str:
    """An answer as a user would see it, without thoughts and control tokens."""
    text = without_thoughts(text)
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text


def padded_width(prompts: Sequence[Any]) -> int:
    """The static length of a batch of prompts, in tokens."""
    multiple = TPU_PROMPT_MULTIPLE if jax.default_backend() == "tpu" else PROMPT_MULTIPLE
    return -(-max(map(len, prompts)) // multiple) * multiple


def checkpoint_stop_ids(base: Base, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: `eos_token_id` of the checkpoint's `generation_config.json`, else the tokenizer's.

    Raises:
      UserError: neither names any.
    """
    folder = base.folder or base.tokenizer_folder
    present = GENERATION_NAME in list_folder(folder)
    config = read_json(join(folder, GENERATION_NAME)) if present else {}
    found = config.get("eos_token_id", tokenizer.eos_token_id)
    ids = tuple(found) if isinstance(found, list) else (found,)
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"{folder}: eos_token_id in {GENERATION_NAME} is {found!r}; give the ids that end an answer")
    return ids
