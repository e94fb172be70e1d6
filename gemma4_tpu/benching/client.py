"""One streamed completion and the arrival times of its chunks; and the other requests to a server.

Times are seconds of `time.perf_counter`, read when a chunk arrives, before it is parsed.
"""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import AsyncIterator
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
_HITS = re.compile(r"^vllm:(?:gpu_)?prefix_cache_(hits|queries)(?:_total)?(?:\{[^}]*\})? ([-+.\deE]+)", re.MULTILINE)


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
            models = {model["id"]: model for model in json.loads(await response.read())["data"]}
    except UserError:
        raise
    except (*_TROUBLE, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{given}: lists no models ({str(error) or repr(error)}); is a server running there?") from None
    if name is None and len(models) != 1:
        raise UserError(
            f"{given}: serves {', '.join(models) or 'no model'}; give bench.served_model_name=<one of them>"
        )
    if name is not None and name not in models:
        raise UserError(f"bench.served_model_name={name}: the server has {', '.join(models) or 'no model'}; give one")
    name = name or next(iter(models))
    return Target(endpoint, name, models[name].get("max_model_len"))


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
        async with client.get(f"{endpoint}/metrics") as response:
            text = await response.text() if response.status == 200 else ""
    except _TROUBLE:
        return None
    totals = {"hits": 0.0, "queries": 0.0}
    found = _HITS.findall(text)
    for name, value in found:
        totals[name] += float(value)
    return (totals["hits"], totals["queries"]) if found else None


async def ask(client: aiohttp.ClientSession, target: Target, body: bytes, answer: TimedAnswer) -> None:
    """Sends one request and fills in the answer, or the reason why it failed."""
    try:
        answer.sent_at = time.perf_counter()
        async with client.post(f"{target.endpoint}/v1/completions", data=body, headers=_JSON) as response:
            if response.status != 200:
                answer.error = await _said(response)
                return
            ended = await _follow(response, answer)
        if answer.error is None and answer.first_at is None:
            answer.error = "the answer contains no token"
        elif answer.error is None and not ended:
            answer.error = f"the answer broke off after {answer.chunks} chunks"
    except (*_TROUBLE, LookupError, TypeError, AttributeError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:_SHOWN]


async def _follow(response: aiohttp.ClientResponse, answer: TimedAnswer) -> bool:
    """Records when chunks arrive; returns whether the server marked the end."""
    ended = False
    async for now, data in _events(response):
        if data == b"[DONE]":
            ended = True
            break
        chunk = json.loads(data)
        if chunk.get("error"):
            answer.error = str(chunk["error"])[:_SHOWN]
            return True
        if usage := chunk.get("usage"):
            answer.output_tokens, answer.counted = usage["completion_tokens"], True
        if choices := chunk.get("choices"):
            if answer.first_at is None or answer.last_at is None:
                answer.first_at = now
            else:
                answer.gaps_seconds.append(now - answer.last_at)
            answer.last_at = now
            ended = ended or choices[0].get("finish_reason") is not None
    if not answer.counted:
        answer.output_tokens = answer.chunks
    return ended


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """(arrival time, data) of each server-sent event."""
    rest = b""
    async for piece in response.content.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip()


def request_body(target: Target, prompt: list[int], output_tokens: int, temperature: float, seed: int | None) -> bytes:
    """The JSON body, made before the clock starts."""
    body: dict[str, Any] = {
        "model": target.model, "prompt": prompt, "max_tokens": output_tokens, "temperature": temperature,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(body if seed is None else {**body, "seed": seed}).encode()


async def _said(response: aiohttp.ClientResponse) -> str:
    return f"{response.status}: {' '.join((await response.text(errors='replace')).split())[:_SHOWN]}"
