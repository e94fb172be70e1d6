"""HTTP side of the embedded server: OpenAI's endpoints in FastAPI; requests are passed to the engine's thread."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from gemma4_tpu.data.markup import strings
from gemma4_tpu.serving.local_body import ApiError, read_request, whole_body
from gemma4_tpu.serving.local_engine import READY, LocalEngine
from gemma4_tpu.serving.local_grammar import AnswerGrammar
from gemma4_tpu.serving.local_metrics import Metrics
from gemma4_tpu.serving.local_process import WorkRefused
from gemma4_tpu.serving.local_protocol import ChatRequest, CompletionRequest, ResponseFormat, TokenizeRequest
from gemma4_tpu.serving.local_reply import Reply
from gemma4_tpu.serving.local_sampling import ABORT, ERROR, AnswerPiece, GeneratedAnswer

GONE_SECONDS = 0.25
"""Interval between checks whether a client is still connected."""
CHARACTERS_PER_TOKEN = 64
"""A prompt with more characters than this per token that fits is refused unread."""


class _Prompt(NamedTuple):
    tokens: list[int]
    echo: str | None = None
    """Its text, if it is to be echoed."""


class Api:
    """The endpoints of one engine."""

    def __init__(self, engine: LocalEngine, metrics: Metrics, model: str, max_model_len: int, key: str | None):
        self._engine, self._metrics, self._model, self._longest = engine, metrics, model, max_model_len
        self._key, self._started = key, int(time.time())
        self._tokenizing = asyncio.Lock()

    def app(self) -> FastAPI:
        """The application, without its docs pages, which load scripts from elsewhere."""
        app = FastAPI(title="gemma4-tpu", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["GET", "POST"], allow_headers=["*"])
        app.add_exception_handler(ApiError, lambda _, error: _error(error))
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(Exception, lambda _, error: _error(ApiError(500, f"{type(error).__name__}: {error}")))
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.one_model)
        app.post("/tokenize")(self.tokenize)
        app.post("/v1/completions")(self.completions)
        app.post("/v1/chat/completions")(self.chat)
        return app

    async def health(self) -> JSONResponse:
        """The engine's state; 200 only if it answers."""
        running, waiting = self._engine.counts
        error = self._engine.error
        told = {"status": self._engine.state, "running": running, "waiting": waiting}
        if error is not None:
            told["error"] = str(error) or repr(error)
        return JSONResponse(told, 200 if self._engine.state == READY and self._engine.alive else 503)

    async def metrics(self) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> dict[str, Any]:
        """`GET /v1/models`: the one model."""
        self._authorise(request)
        return {"object": "list", "data": [self._card()]}

    async def one_model(self, name: str, request: Request) -> dict[str, Any]:
        """`GET /v1/models/<name>`."""
        self._authorise(request)
        self._check_model(name)
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model, "object": "model", "created": self._started, "owned_by": "gemma4-tpu",
            "max_model_len": self._longest,
        }  # fmt: skip

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """`POST /tokenize`, as in vLLM, for texts: returns their ids."""
        self._authorise(request)
        body = read_request(TokenizeRequest, await whole_body(request))
        if body.model is not None:
            self._check_model(body.model)
        self._engine_ready()
        options = {"add_special_tokens": body.add_special_tokens}
        async with self._tokenizing:
            tokens = await asyncio.to_thread(lambda: self._engine.tokenizer(body.prompt, **options)["input_ids"])
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._longest}

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`: continues texts or token ids."""
        self._authorise(request)
        body = read_request(CompletionRequest, await whole_body(request))
        self._admit(body)
        self._engine_ready()
        prompts = [await self._prompt(prompt, body) for prompt in body.prompts]
        if not prompts:
            raise ApiError(400, "prompt is empty", param="prompt")
        return await self._answer(body, request, prompts)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`: the next turn of a conversation."""
        self._authorise(request)
        body = read_request(ChatRequest, await whole_body(request))
        self._admit(body)
        self._engine_ready()
        turns, tools = body.turns(), body.callable_tools
        self._check_characters(sum(map(len, strings([turns, tools]))), "messages")
        self._check_arguments(body.chat_template_kwargs)
        options = {"add_generation_prompt": True, **body.chat_template_kwargs}
        most = self._longest * CHARACTERS_PER_TOKEN
        try:
            async with self._tokenizing:
                prompt = await asyncio.to_thread(self._engine.render, turns, tools, options, most)
        except WorkRefused as error:
            raise ApiError(400, f"the chat template refuses this: {error}", param="messages") from None
        return await self._answer(body, request, [_Prompt(prompt)])

    def _check_arguments(self, given: Mapping[str, Any]) -> None:
        known = self._engine.template_arguments | {"add_generation_prompt"}
        if unknown := sorted(given.keys() - known):
            raise ApiError(
                400, f"the chat template has no argument {unknown[0]!r}; it has {', '.join(sorted(known))}",
                param=f"chat_template_kwargs.{unknown[0]}",
            )  # fmt: skip

    def _admit(self, body: CompletionRequest | ChatRequest) -> None:
        if body.model is not None:
            self._check_model(body.model)
        body.check_unknown()

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise ApiError(401, "invalid API key", code="invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._model:
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {self._model!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def _engine_ready(self) -> None:
        if self._engine.state != READY:
            raise ApiError(503, f"the engine is {self._engine.state}", code="engine_not_ready")

    def _check_characters(self, count: int, param: str) -> None:
        if count > self._longest * CHARACTERS_PER_TOKEN:
            raise self._too_long(f"the prompt has {count} characters", param)

    def _too_long(self, told: str, param: str) -> ApiError:
        message = f"this model's maximum context length is {self._longest} tokens; {told}"
        return ApiError(400, message, param=param, code="context_length_exceeded")

    async def _prompt(self, prompt: str | list[int], body: CompletionRequest) -> _Prompt:
        """A text as the tokenizer starts one (with `<bos>`), or the text of tokens (without)."""
        if not prompt:
            raise ApiError(400, "prompt is empty", param="prompt")
        tokenizer, options = self._engine.tokenizer, {"add_special_tokens": body.add_special_tokens}
        if isinstance(prompt, str):
            self._check_characters(len(prompt), "prompt")
            async with self._tokenizing:
                tokens = await asyncio.to_thread(lambda: tokenizer(prompt, **options)["input_ids"])
            return _Prompt(tokens, prompt if body.echo else None)
        self._check_tokens(prompt, "prompt")
        start = prompt[0] == tokenizer.bos_token_id
        return _Prompt(prompt, tokenizer.decode(prompt[start:]) if body.echo else None)

    def _check_tokens(self, tokens: Iterable[int], param: str) -> None:
        if not all(0 <= token < self._engine.vocabulary for token in tokens):
            raise ApiError(400, f"token ids are from 0 to {self._engine.vocabulary - 1}", param=param)

    async def _grammar(self, wanted: ResponseFormat | None) -> AnswerGrammar | None:
        if wanted is None or wanted.schema_wanted is None:
            return None
        try:
            return await asyncio.to_thread(self._engine.grammar, wanted.schema_wanted)
        except WorkRefused as error:
            raise ApiError(400, f"response_format cannot be satisfied: {error}", param="response_format") from None

    async def _answer(
        self, body: CompletionRequest | ChatRequest, request: Request, prompts: Sequence[_Prompt]
    ) -> Response:
        """Answers every prompt `n` times, as one reply or a stream."""
        is_chat = isinstance(body, ChatRequest)
        if (count := len(prompts) * body.n) > self._longest:
            told = f"{len(prompts)} prompts, n={body.n}: {count} answers; a request can have up to {self._longest}"
            raise ApiError(400, told, param="n" if is_chat else "prompt")
        for tokens, _ in prompts:
            wanted = 1 if body.limit is None else body.limit
            if len(tokens) + wanted > self._longest:
                told = f"the prompt has {len(tokens)} and {wanted} more are requested"
                raise self._too_long(told, "messages" if is_chat else "prompt")
        self._check_tokens(body.logit_bias or (), "logit_bias")
        grammar = await self._grammar(body.response_format)
        queue: asyncio.Queue[tuple[int, AnswerPiece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def teller(index: int) -> Any:
            return lambda piece: _hand_over(loop, queue, (index, piece))

        answers = [
            GeneratedAnswer(
                tokens, body.sampling(self._engine.defaults, self._longest - len(tokens), choice),
                teller(place * body.n + choice), chat=is_chat, most_calls=body.most_calls, echo=echo,
                grammar=grammar.copy() if grammar else None,
            )
            for place, (tokens, echo) in enumerate(prompts) for choice in range(body.n)
        ]  # fmt: skip
        reply = Reply(
            self._model, sum(len(tokens) for tokens, _ in prompts), self._engine.tokenizer, is_chat=is_chat,
            as_ids=body.return_tokens_as_token_ids,
        )  # fmt: skip
        if body.stream:
            events = self._stream(body, request, answers, queue, reply)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        pieces: list[list[AnswerPiece]] = [[] for _ in answers]
        async with self._under_way(request, answers):
            async for index, piece in _pieces(queue, len(answers)):
                if piece.finish in (ERROR, ABORT):
                    raise ApiError(500, piece.error or "the client is gone")
                pieces[index].append(piece)
                reply.completion_tokens += len(piece.tokens)
        return JSONResponse(reply.whole(pieces))

    async def _stream(
        self, body: CompletionRequest | ChatRequest, request: Request, answers: list[GeneratedAnswer],
        queue: asyncio.Queue[tuple[int, AnswerPiece]], reply: Reply,
    ) -> AsyncIterator[str]:  # fmt: skip
        """Server-sent events: one chunk per token, usage if requested, `[DONE]`."""
        wanted = body.stream_options
        begun: set[int] = set()
        async with self._under_way(request, answers):
            async for index, piece in _pieces(queue, len(answers)):
                if piece.finish in (ERROR, ABORT):
                    yield _event(ApiError(500, piece.error or "the client is gone").plain())
                    return
                reply.completion_tokens += len(piece.tokens)
                more: dict[str, Any] = {"usage": None} if wanted and wanted.include_usage else {}
                if wanted and wanted.continuous_usage_stats:
                    more = {"usage": reply.usage()}
                yield _event(reply.chunk([reply.delta(index, piece, first=index not in begun)], **more))
                begun.add(index)
        if wanted and wanted.include_usage:
            yield _event(reply.chunk([], usage=reply.usage()))
        yield "data: [DONE]\n\n"

    @asynccontextmanager
    async def _under_way(self, request: Request, answers: list[GeneratedAnswer]) -> AsyncIterator[None]:
        """Submits the answers; cancels those that are unfinished at the end, or when the client disconnects."""

        def give_up() -> None:
            for answer in answers:
                answer.aborted = True

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(GONE_SECONDS)
            give_up()

        watching = asyncio.create_task(watch())
        try:
            for answer in answers:
                self._engine.submit(answer)
            yield
        finally:
            give_up()
            watching.cancel()


async def _pieces(
    queue: asyncio.Queue[tuple[int, AnswerPiece]], answers: int
) -> AsyncIterator[tuple[int, AnswerPiece]]:
    """Yields the engine's pieces until every answer has ended."""
    while answers:
        index, piece = await queue.get()
        answers -= piece.finish is not None
        yield index, piece


def _hand_over(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[tuple[int, AnswerPiece]], item: Any) -> None:
    """Passes an item from the engine's thread to the loop; if the loop is closed, nobody is waiting."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, item)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error.plain(), error.status, headers)


def _http_error(request: Request, error: Any) -> Response:
    """Error for an unknown page or method; requests for a page's methods are answered."""
    if request.method == "OPTIONS" and error.status_code == 405:
        return Response(status_code=204, headers=error.headers)
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    pages = ", ".join(f"{method} {route.path}" for route in routes for method in sorted(route.methods or ()))
    told = f"{error.detail}: {request.method} {request.url.path}; this server has {pages}"
    return _error(ApiError(error.status_code, told), error.headers)


def api_key() -> str | None:
    """The API key that clients must send, from the environment; None admits everyone."""
    return os.environ.get("VLLM_API_KEY") or None
