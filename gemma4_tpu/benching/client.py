"""One streamed completion and the arrival times of its chunks; and the other requests to a server.

Times are seconds of `time.perf_counter`, read when a chunk arrives, before it is parsed.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from gemma4_tpu.errors import UserError

KEY = "OPENAI_API_KEY"
CONNECT_SECONDS = 60.0
_TROUBLE = (aiohttp.ClientError, OSError, TimeoutError)
_JSON = {"Content-Type": "application/json"}
_PIECE = 50_000  # characters of a text per request to the tokenizer
_SHOWN = 300  # characters of a server's message
_ASIDE = aiohttp.ClientTimeout(total=30.0)  # for what a measurement must not wait for
_HITS = re.compile(
    r"^vllm:(?:gpu_)?prefix_cache_(hits|queries)(?:_total)?(?:\{[^}]*\})? (\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s",
    re.MULTILINE,
)
_GIVEN_UP = ("abort", "error", "content_filter")
"""Reasons to finish, of vLLM, SGLang and OpenAI, of answers that the server gave up. Servers have names of their own
for an answer's end (TGI: `eos_token`); one that comes too early is counted as short.
"""
_MOST_TOKENS = 2**53


class UnusableAnswerError(Exception):
    """The answer is not a whole completion; the message says why."""


@dataclass
class TimedAnswer:
    """The answer to one request, with its times."""

    prompt_tokens: int
    due_at: float
    """When the request was due."""
    sent_at: float = 0.0
    first_at: float | None = None
    """First chunk with choices."""
    last_at: float | None = None
    """Last chunk with choices."""
    gaps_seconds: list[float] = field(default_factory=list)
    """Gaps between consecutive chunks with choices."""
    output_tokens: int = 0
    """As reported in the server's usage; without usage, the number of chunks."""
    counted: bool = False
    """Whether the server reported its number of tokens."""
    error: str | None = None
    """Why the request failed; None: the answer is complete."""

    @property
    def chunks(self) -> int:
        return len(self.gaps_seconds) + (self.first_at is not None)

    @property
    def ttft_seconds(self) -> float:
        assert self.first_at is not None
        return self.first_at - self.sent_at

    @property
    def latency_seconds(self) -> float:
        """Time to the last chunk with choices."""
        assert self.last_at is not None
        return self.last_at - self.sent_at

    @property
    def tpot_seconds(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.latency_seconds - self.ttft_seconds) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Target:
    """A model on a server."""

    endpoint: str
    """Base URL without /v1."""
    model: str
    max_model_len: int | None
    """Longest sequence in tokens; None: the server doesn't say."""


def session(timeout_seconds: float) -> aiohttp.ClientSession:
    """A session with unlimited concurrent connections, and the key from the environment, if any.

    It uses aiohttp, as `vllm bench serve` does, since a client with more overhead would distort the measurement.
    """
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if least != most:  # each concurrent request takes a file descriptor, and shells allow about a thousand
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=timeout_seconds)
    return aiohttp.ClientSession(headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


async def find_target(endpoint: str, name: str | None) -> Target:
    """Finds the served model, or the one with this name.

    Raises:
      UserError: no server answers, it lacks that model, or it has several and none was named.
    """
    given = f"endpoint={endpoint}"
    try:
        async with session(30.0) as client, client.get(f"{endpoint}/v1/models") as response:
            if response.status in (401, 403):
                raise UserError(f"{given}: {await _said(response)}; is {KEY} in the environment right?")
            response.raise_for_status()
            models = _listed(await response.read())
    except UserError:
        raise
    except (*_TROUBLE, ValueError) as error:
        raise UserError(f"{given}: lists no models ({str(error) or repr(error)}); is a server running there?") from None
    if name is None and len(models) != 1:
        raise UserError(
            f"{given}: serves {', '.join(models) or 'no model'}; give bench.served_model_name=<one of them>"
        )
    if name is not None and name not in models:
        raise UserError(f"bench.served_model_name={name}: the server has {', '.join(models) or 'no model'}; give one")
    name = name or next(iter(models))
    longest = models[name].get("max_model_len")
    return Target(endpoint, name, longest if isinstance(longest, int) and longest > 0 else None)


def _listed(answer: bytes) -> dict[str, dict[str, Any]]:
    """The models of `/v1/models` by their ids; raises `ValueError` if these are no models."""
    try:
        listed = json.loads(answer)["data"]
        models = {model["id"]: model for model in listed}
    except (LookupError, TypeError, ValueError, RecursionError):
        models = None
    if models is None or not all(isinstance(name, str) for name in models):
        raise ValueError("the answer is not a list of models, each with a text as its id")
    return models


async def tokens_of(target: Target, path: str, text: str) -> list[int]:
    """Token ids of the text in the file `path`, by the server's own tokenizer (vLLM's `/tokenize`).

    Raises:
      UserError: the server does not tokenize.
    """
    tokens: list[int] = []
    try:
        async with session(300.0) as client:
            for start in range(0, len(text), _PIECE):
                piece = {"model": target.model, "prompt": text[start : start + _PIECE], "add_special_tokens": False}
                async with client.post(f"{target.endpoint}/tokenize", json=piece) as response:
                    if response.status != 200:
                        raise ValueError(await _said(response))
                    tokens += map(int, json.loads(await response.read())["tokens"])
        return tokens
    except (*_TROUBLE, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"bench.prompts={path}: the server at {target.endpoint} does not tokenize it at /tokenize, as vLLM would"
            f" ({str(error) or repr(error)}); leave it out for random token ids"
        ) from None


async def prefix_cache_tokens(client: aiohttp.ClientSession, endpoint: str) -> tuple[float, float] | None:
    """(prompt tokens found in the prefix cache, prompt tokens looked up) since the start; None: not reported."""
    try:
        async with client.get(f"{endpoint}/metrics", timeout=_ASIDE) as response:
            text = await response.text(errors="replace") if response.status == 200 else ""
    except _TROUBLE:
        return None
    totals = {"hits": 0.0, "queries": 0.0}
    found = _HITS.findall(text)
    for name, value in found:
        totals[name] += float(value)
    return (totals["hits"], totals["queries"]) if found else None


def prefix_cache_growth(
    before: tuple[float, float] | None, after: tuple[float, float] | None
) -> tuple[float, float] | tuple[None, None]:
    """(hits, queries) from one reading of `prefix_cache_tokens` to the next. (None, None): unknown, as not reported, or
    reported by different servers behind one address, or by one that started in between.
    """
    if before is None or after is None:
        return None, None
    hits, queries = after[0] - before[0], after[1] - before[1]
    return (hits, queries) if 0 <= hits <= queries else (None, None)


async def ask(client: aiohttp.ClientSession, target: Target, body: bytes, answer: TimedAnswer) -> None:
    """Sends one request and fills in the answer, or the reason why it failed."""
    patience = client.timeout.sock_read
    try:
        answer.sent_at = time.perf_counter()
        async with (
            asyncio.timeout(patience) as quiet,
            client.post(f"{target.endpoint}/v1/completions", data=body, headers=_JSON) as response,
        ):
            if response.status != 200:
                raise UnusableAnswerError(await _said(response))
            await _follow(response, answer, lambda: _extend(quiet, patience))
    except UnusableAnswerError as error:
        answer.error = str(error)
    except aiohttp.ConnectionTimeoutError as error:
        answer.error = f"no connection within {CONNECT_SECONDS:g} s: {error}"[:_SHOWN]
    except TimeoutError:
        answer.error = f"no chunk within {patience:g} s (bench.request_timeout_seconds)"
    except (*_TROUBLE, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:_SHOWN]


def _extend(quiet: asyncio.Timeout, seconds: float | None) -> None:
    """Restarts the wait for a chunk: comments that keep a connection alive don't."""
    if seconds is not None:
        quiet.reschedule(asyncio.get_running_loop().time() + seconds)


async def _follow(response: aiohttp.ClientResponse, answer: TimedAnswer, came: Callable[[], None]) -> None:
    """Records when chunks arrive; calls `came` for each.

    Raises:
      UnusableAnswerError: the answer is not a whole completion.
    """
    events, ended, finish, stray = 0, False, None, b""
    async for now, data in _events(response):
        came()
        events += 1
        if data == b"[DONE]":
            ended = True
            break
        chunk = _chunk(data)
        if chunk.get("error"):
            raise UnusableAnswerError(_short(chunk["error"]))
        usage, choices = chunk.get("usage"), chunk.get("choices")
        if usage and (tokens := usage.get("completion_tokens")) is not None:
            answer.output_tokens, answer.counted = _count(tokens), True
        if choices:
            if answer.first_at is None or answer.last_at is None:
                answer.first_at = now
            else:
                answer.gaps_seconds.append(now - answer.last_at)
            answer.last_at = now
            finish = choices[0].get("finish_reason") or finish
        elif choices is None and not usage:
            stray = data
    if not answer.counted:
        answer.output_tokens = answer.chunks
    told = f"; the server says {_short(stray)}" if stray else ""
    if not events:
        raise UnusableAnswerError(f"the answer contains no events; its content-type is {response.content_type}")
    if answer.first_at is None:
        raise UnusableAnswerError(f"the answer contains no token{told}")
    if finish is None and (stray or not ended):
        raise UnusableAnswerError(f"the answer broke off after {answer.chunks} chunks{told}")
    if finish in _GIVEN_UP:
        raise UnusableAnswerError(f"the answer ended with finish_reason {_short(finish)} after {answer.chunks} chunks")


def _chunk(data: bytes) -> dict[str, Any]:
    """A chunk of a completion, whose parts have the right types."""
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        chunk = None
    if isinstance(chunk, dict):
        usage, choices = chunk.get("usage"), chunk.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        if isinstance(usage, dict | None) and isinstance(choices, list | None) and isinstance(first, dict):
            return chunk
    raise UnusableAnswerError(f"not a chunk of a completion: {_short(data)}")


def _count(tokens: Any) -> int:
    """The server's count of an answer's tokens."""
    is_number = isinstance(tokens, int | float) and not isinstance(tokens, bool)
    if not is_number or not 0 <= tokens < _MOST_TOKENS or tokens % 1:
        raise UnusableAnswerError(f"usage.completion_tokens={_short(repr(tokens))} is not a number of tokens")
    return int(tokens)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """(arrival time, data) of each server-sent event; those without data are no events."""
    rest = b""
    async for piece in response.content.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()):
                yield now, data


def request_body(target: Target, prompt: list[int], output_tokens: int, temperature: float, seed: int | None) -> bytes:
    """The JSON body, made before the clock starts."""
    body: dict[str, Any] = {
        "model": target.model, "prompt": prompt, "max_tokens": output_tokens, "temperature": temperature,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(body if seed is None else {**body, "seed": seed}).encode()


def _short(said: Any) -> str:
    """What a server says, in one line."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said if isinstance(said, str) else repr(said)
    return " ".join(text.split())[:_SHOWN]


async def _said(response: aiohttp.ClientResponse) -> str:
    return f"{response.status}: {_short(await response.text(errors='replace'))}"
