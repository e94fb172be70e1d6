"""OpenAI's completions as the embedded server takes them: requests with their limits, errors, answers as JSON.

Keys that OpenAI or vLLM know and this server does not honour are refused unless they say nothing (null, 0, false, …).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma4_tpu.serving.local_sampling import AnswerPiece, AnswerSampling

MOST_CHOICES = 64
MOST_STOPS = 64
"""Each is looked for after every token."""
Form = TypeVar("Form", bound=BaseModel)
_SILENT: tuple[Any, ...] = (None, False, 0, "", [], {}, "none", "auto", "text", {"type": "text"})
_NEUTRAL = {"best_of": 1, "repetition_penalty": 1, "length_penalty": 1, "skip_special_tokens": True, "store": True}
_NOTHING_TO_DO = ("user", "metadata", "request_id", "priority", "service_tier", "safety_identifier", "prompt_cache_key")


class ApiError(Exception):
    """Becomes `{"error": …}`."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def plain(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def read_request(form: type[Form], body: bytes) -> Form:
    """The request in the body of a POST.

    Raises:
      ApiError: it is not JSON, holds text that is not Unicode, or is not such a request.
    """
    try:
        value = json.loads(body, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text that a tokenizer could read
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds a lone surrogate, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON that can be read: {error}") from None
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or None
        raise ApiError(400, f"{place or 'body'}: {first['msg']}", param=place) from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class StreamOptions(BaseModel):
    """`continuous_usage_stats` is vLLM's: usage with every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most; None: not told."""
        return self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        return None

    def check_unknown(self) -> None:
        """Raises `ApiError` for a key that would change the answer and is not honoured."""
        for key, value in (self.model_extra or {}).items():
            if key not in _NOTHING_TO_DO and value not in _SILENT and value != _NEUTRAL.get(key, ...):
                raise ApiError(400, f"{key} is not supported by this server", param=key, code="unsupported_parameter")

    def sampling(self, defaults: Mapping[str, float], room: int, choice: int) -> AnswerSampling:
        """What the request says, else the checkpoint's `defaults`. `room`: tokens that fit after the prompt."""

        def said(name: str, neutral: float) -> float:
            value = getattr(self, name)
            return defaults.get(name, neutral) if value is None else value

        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return AnswerSampling(
            max_tokens=room if self.limit is None else self.limit,
            temperature=said("temperature", 1.0), top_p=said("top_p", 1.0), top_k=max(0, int(said("top_k", 0))),
            seed=None if self.seed is None else (self.seed + choice) % 2**64, stop=tuple(text for text in stop if text),
            stop_token_ids=frozenset(self.stop_token_ids or ()), ignore_eos=self.ignore_eos,
            logprobs=self.told_logprobs,
        )  # fmt: skip


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    return_tokens_as_token_ids: bool = False

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as given."""
        single = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if single else self.prompt  # type: ignore[return-value]


class ChatMessage(BaseModel):
    """One turn; content as text or as parts of text, which the chat template joins."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def turns(self) -> list[dict[str, Any]]:
        """For the chat template."""
        for message in self.messages:
            for part in message.content if isinstance(message.content, list) else ():
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    what = f"content of type {part.get('type')!r}: this server reads text only"
                    raise ApiError(400, what, param="messages")
        return [{**message.model_dump(), "content": message.content or ""} for message in self.messages]


class Reply:
    """Writes the answers to one request; `kind` is `chat` or `text`."""

    def __init__(self, kind: str, identifier: str, model: str, prompt_tokens: int, tokenizer: Any, as_ids: bool):
        self._kind, self._tokenizer, self._as_ids = kind, tokenizer, as_ids
        self._head = {"id": identifier, "created": int(time.time()), "model": model}
        self._prompt_tokens, self.completion_tokens = prompt_tokens, 0

    def usage(self) -> dict[str, int]:
        """Tokens so far, as OpenAI counts them."""
        total = self._prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total,
        }  # fmt: skip

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        name = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": choices, **more}

    def delta(self, index: int, piece: AnswerPiece, *, first: bool) -> dict[str, Any]:
        """A piece of one choice, in a stream."""
        if self._kind == "chat":
            delta = {"role": "assistant"} if first else {}
            thought = {"reasoning": piece.reasoning} if piece.reasoning else {}
            content: dict[str, Any] = {"delta": {**delta, **thought, "content": piece.text}}
        else:
            content = {"text": piece.text}
        return {"index": index, **content, "logprobs": self._logprobs([piece]), "finish_reason": piece.finish}

    def whole(self, pieces: list[list[AnswerPiece]]) -> dict[str, Any]:
        """The answer without a stream; `pieces`: those of each choice."""
        choices = []
        for index, parts in enumerate(pieces):
            text = "".join(piece.text for piece in parts)
            content: dict[str, Any] = {"text": text}
            if self._kind == "chat":
                thought = "".join(piece.reasoning for piece in parts)
                message = {"role": "assistant", "content": text, **({"reasoning": thought} if thought else {})}
                content = {"message": message}
            finish = parts[-1].finish
            choices.append({"index": index, **content, "logprobs": self._logprobs(parts), "finish_reason": finish})
        name = "chat.completion" if self._kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": self.usage()}

    def _logprobs(self, pieces: list[AnswerPiece]) -> dict[str, Any] | None:
        """As `/v1/completions` tells them."""
        found = [chance for piece in pieces for chance in piece.logprobs]
        if not found:
            return None
        names = [self._name(one.token) for one in found]
        offsets = list(accumulate(map(len, names[:-1]), initial=0))
        top = [{self._name(token): value for token, value in one.top} for one in found]
        return {
            "tokens": names, "token_logprobs": [one.logprob for one in found], "top_logprobs": top,
            "text_offset": offsets,
        }  # fmt: skip

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokenizer.decode([token])
