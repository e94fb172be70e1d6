"""Completions from an OpenAI-compatible server: bounded concurrency, retries with back-off, a seed for each sample.

Answers to be scored go to its other endpoint, `/completions`, as prompt and answer in tokens from a local tokenizer;
the server returns the log-probabilities of its prompt (`echo`), as vLLM and the embedded server do.

Whatever the server sends leads to a sample, to another attempt, or finally to none; only a refusal of everything (a
wrong key, no such model) ends an evaluation. The server renders the prompt with its own chat template. A key comes from
OPENAI_API_KEY and is never shown.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.drops import RowDropped
from gemma4_tpu.data.markup import without_thoughts
from gemma4_tpu.data.pictures import pictures_of
from gemma4_tpu.data.turns import IMAGE_PART
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.endpoint_responses import KEY, SHOWN, RequestRefused, answer_of, check, models_of, prompt_logprobs
from gemma4_tpu.evals.generate import SampleRequest, answer_ids, rendered, scored_sample
from gemma4_tpu.evals.problems import Message
from gemma4_tpu.evals.store import Sample

log = logging.getLogger(__name__)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
LONGEST_RETRY_AFTER_SECONDS = 300.0
CONNECT_SECONDS = 10.0


class Endpoint:
    """Generates with a server.

    Raises:
      UserError: the server does not answer, or it lists several models and `endpoint_model` names none.
    """

    def __init__(self, config: EvalConfig, tokenizer: Any = None):
        """Args:
        config: server and sampling.
        tokenizer: that of the server's model, for answers to be scored.
        """
        self._config = config
        self._chat = ChatFormat(tokenizer, config.thoughts or "drop") if tokenizer is not None else None
        self._takes_seeds = True
        self._reasons: Counter[str] = Counter()  # why samples never arrived
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._options = {**_options(config), "limits": limits}
        self._model = config.endpoint_model or served_model(config)["id"]

    @property
    def description(self) -> dict[str, Any]:
        """Model and parameters, for the report."""
        seeds = "one for each sample" if self._takes_seeds else "none: the server takes none"
        thoughts = self._config.thoughts or "drop"
        return {"endpoint": self._config.endpoint, "model": self._model, "seeds": seeds, "thoughts": thoughts}

    def example(self, request: SampleRequest) -> str:
        """The conversation; the server adds the markup."""
        return "\n".join(f"[{message['role']}]\n{_in_words(message['content'])}" for message in request.messages)

    def generate(self, requests: Sequence[SampleRequest]) -> Iterator[Sample]:
        """Yields samples as they arrive; those that fail after all attempts are left out, and logged by reason.

        Raises:
          UserError: the server refuses every request (a wrong key, no such model), or a scored question has a picture.
        """
        if any(request.scored and pictures_of(request.messages) for request in requests):
            raise UserError(
                "eval.answers.choose: a server scores text tokens only, and these questions have pictures; give"
                " eval.answers.choose=letter, or the model itself (run= or model.path=) instead of eval.endpoint"
            )
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()

        async def work() -> None:
            async for sample in self._all(requests):
                done.put(sample)
                if stop.is_set():
                    return

        def run() -> None:
            try:
                asyncio.run(work())
                done.put(None)
            except BaseException as error:
                done.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (item := done.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()

    async def _all(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample]:
        """Samples in order of completion."""
        gate, failures = asyncio.Semaphore(self._config.concurrency), 0
        async with httpx.AsyncClient(**self._options) as client:
            tasks = [asyncio.create_task(self._one(client, gate, request)) for request in requests]
            try:
                for number, task in enumerate(asyncio.as_completed(tasks), 1):
                    sample = await task
                    failures += sample is None
                    if sample is not None:
                        yield sample
                    if number % 100 == 0 or number == len(tasks):
                        log.info("%d of %d answers, %d never arrived", number, len(tasks), failures)
            finally:
                for task in tasks:
                    task.cancel()
                for reason, count in self._reasons.items():
                    if count > 1:
                        log.warning("%d samples in all never arrived: %s", count, reason)

    async def _one(self, client: httpx.AsyncClient, gate: asyncio.Semaphore, request: SampleRequest) -> Sample | None:
        """One sample, with up to `retries` further attempts; None: it never arrived."""
        async with gate:
            reason, asked_for = "", 0.0
            for attempt in range(self._config.retries + 1):
                if attempt:
                    await asyncio.sleep(max(_wait_seconds(attempt, random.random()), asked_for))
                try:
                    async with asyncio.timeout(self._config.request_timeout_seconds):
                        return await self._ask(client, request)
                except UserError:
                    raise
                except RequestRefused as refusal:
                    reason = str(refusal)
                    break
                except (httpx.HTTPError, TimeoutError, ValueError) as error:
                    reason = str(error) or repr(error)
                    asked_for = _retry_after_seconds(error)
                    log.debug("%s %d, attempt %d: %s", request.problem, request.sample, attempt + 1, reason)
        self._reasons[reason := reason[:SHOWN]] += 1
        level = logging.WARNING if self._reasons[reason] == 1 else logging.DEBUG  # the rest is counted at the end
        log.log(level, "%s, sample %d never arrived: %s", request.problem, request.sample, reason)
        return None

    async def _ask(self, client: httpx.AsyncClient, request: SampleRequest) -> Sample:
        """One attempt.

        Raises:
          UserError: the server refuses everything.
          RequestRefused: it refuses this one.
          httpx.HTTPError, ValueError: no answer, or an invalid one; the next attempt may succeed.
        """
        if request.scored:
            return await self._score(client, request)
        with_seed = self._takes_seeds
        response = await client.post(f"{self._config.endpoint}/chat/completions", json=self._body(request, with_seed))
        # Some servers refuse the key `seed` itself. Another request in flight may have found that out first.
        if response.status_code in (400, 422) and with_seed and "seed" in response.text.lower():
            if self._takes_seeds:
                self._takes_seeds = False
                log.warning("the server refuses seeds, so none are sent: samples are not reproducible")
            return await self._ask(client, request)
        check(response, self._config)
        text, finish, tokens = answer_of(response)
        return Sample(
            problem=request.problem, sample=request.sample, completion=without_thoughts(text), finish=finish,
            tokens=tokens, seed=request.seed if with_seed else None,
        )  # fmt: skip

    async def _score(self, client: httpx.AsyncClient, request: SampleRequest) -> Sample:
        """The sample of a request whose answers are to be scored; raises as `_ask` does."""
        assert self._chat is not None  # the checks
        (prompt,) = self._chat.encode([rendered(self._chat, request)])
        choices = []
        for own in answer_ids(self._chat, request.scored):
            body = {
                "model": self._model, "prompt": [*prompt.tolist(), *own.tolist()], "echo": True, "logprobs": 1,
                "max_tokens": 1, "temperature": 0,
            }  # fmt: skip
            response = await client.post(f"{self._config.endpoint}/completions", json=body)
            check(response, self._config)
            found = prompt_logprobs(response, len(prompt) + len(own))[len(prompt) :]
            choices.append({"logprob": float(sum(found)), "tokens": len(own)})
        return scored_sample(request, choices)

    def _body(self, request: SampleRequest, with_seed: bool) -> dict[str, Any]:
        config = self._config
        body = {
            "model": self._model, "messages": _as_openai(request.messages), "temperature": config.temperature,
            "top_p": config.top_p, "max_tokens": config.max_new_tokens, "n": 1,
        }  # fmt: skip
        if config.thoughts == "train":
            body["chat_template_kwargs"] = {"enable_thinking": True}
        if request.tools:
            body["tools"] = list(request.tools)
        return {**body, "seed": request.seed} if with_seed else body


def _as_openai(messages: Sequence[Message]) -> list[Message]:
    """Messages in OpenAI's format: a picture in normal form becomes a `data:` URL."""
    return [
        {**message, "content": [_part_as_openai(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _part_as_openai(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != IMAGE_PART:
        return part
    try:
        return {"type": "image_url", "image_url": {"url": part["image"].data_url()}}
    except RowDropped as problem:  # it was read when the evaluation began
        raise UserError(f"a picture can no longer be read ({problem.detail}); restore it and start again") from None


def _in_words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join("[picture]" if part["type"] == IMAGE_PART else part["text"] for part in content)


def served_model(config: EvalConfig) -> dict[str, Any]:
    """The server's entry for the requested model: its `id`, and whatever else it lists.

    Raises:
      UserError: there is no server, it lists no such model, or it lists several and `endpoint_model` names none.
    """
    given = f"eval.endpoint={config.endpoint}"
    try:
        with httpx.Client(**_options(config)) as client:
            response = client.get(f"{config.endpoint}/models")
        check(response, config)
        listed = models_of(response)
    except UserError:
        raise
    except (httpx.HTTPError, RequestRefused, ValueError) as error:
        raise UserError(f"{given}: lists no models ({error or repr(error)}); is a server running there?") from None
    asked = [model for name, model in listed.items() if config.endpoint_model in (None, name)]
    if len(asked) != 1:
        raise UserError(f"{given}: serves {', '.join(listed) or 'no model'}; give eval.endpoint_model=<one of them>")
    return asked[0]


def _options(config: EvalConfig) -> dict[str, Any]:
    """Options of an HTTP client."""
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
    return {"headers": headers, "timeout": httpx.Timeout(config.request_timeout_seconds, connect=CONNECT_SECONDS)}


def _retry_after_seconds(error: Exception) -> float:
    """Seconds that the server asks to wait (given in seconds or as a date), up to a limit; 0 if it does not ask."""
    header = error.response.headers.get("Retry-After", "") if isinstance(error, httpx.HTTPStatusError) else ""
    try:
        given = header.strip()
        seconds = float(given) if given.isdecimal() else parsedate_to_datetime(given).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS)


def _wait_seconds(attempt: int, chance: float) -> float:
    """Exponential back-off, times a random factor from a half to 1, so that clients don't all return at once."""
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (attempt - 1)) * (0.5 + chance / 2)
