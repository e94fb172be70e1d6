"""OpenAI's completions as the embedded server accepts them: requests with their limits.

Keys that OpenAI or vLLM define and this server does not support are refused, unless they have no effect (null, 0,
false, …).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gemma4_tpu.serving.local_body import ApiError, read_json
from gemma4_tpu.serving.local_sampling import AnswerSampling

MOST_CHOICES = 64
MOST_STOPS = 64
"""Each is searched for after every token."""
MOST_LOGPROBS = 20
"""Maximal number of most likely tokens reported per token, as in OpenAI and vLLM."""
_SILENT: tuple[Any, ...] = (None, False, 0, "", [], {}, "none", "auto", "text", {"type": "text"})
_USUAL = {
    "best_of": 1, "length_penalty": 1, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "add_generation_prompt": True, "include_reasoning": True,
}  # fmt: skip
"""Values of other keys that have no effect: these keys are not off when omitted."""
_NOTHING_TO_DO = ("user", "metadata", "request_id", "priority", "service_tier", "safety_identifier", "prompt_cache_key",
                  "store")  # fmt: skip


class StreamOptions(BaseModel):
    """`continuous_usage_stats` is vLLM's: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class NamedSchema(BaseModel):
    """For `response_format`; `strict` has no effect, because every schema is either enforced or refused."""

    name: str | None = None
    content: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    """The required format of an answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | bool | None:
        """The schema; None: any text is allowed."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.content
        return {"type": "object"} if self.type == "json_object" else None


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_omitted(cls, value: Any) -> Any:
        """OpenAI's schema allows null for most keys; here where null has no meaning of its own, it is the default."""
        plain = {name for name, field in cls.model_fields.items() if type(None) not in get_args(field.annotation)}
        if not isinstance(value, dict):
            return value
        return {key: given for key, given in value.items() if given is not None or key not in plain}

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only with stream: true", param="stream_options")
        return self

    @property
    def limit(self) -> int | None:
        """Maximal number of tokens of an answer; None: not given."""
        return self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        return None

    @property
    def most_calls(self) -> float:
        """Maximal number of tool calls in an answer."""
        return 0

    def check_unknown(self) -> None:
        """Raises `ApiError` for a key that would change the answer and is not supported."""
        for key, value in (self.model_extra or {}).items():
            silent = value in (None, _USUAL[key]) if key in _USUAL else value in _SILENT
            if key not in _NOTHING_TO_DO and not silent:
                told = f"{key} is not supported by this server; leave it out"
                raise ApiError(400, told, param=key, code="unsupported_parameter")

    def sampling(self, defaults: Mapping[str, float], room: int, choice: int) -> AnswerSampling:
        """The request's settings, else the checkpoint's `defaults`. `room`: tokens that fit after the prompt."""

        def said(name: str, neutral: float) -> float:
            value = getattr(self, name)
            return defaults.get(name, neutral) if value is None else value

        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return AnswerSampling(
            max_tokens=room if self.limit is None else self.limit,
            temperature=said("temperature", 1.0), top_p=said("top_p", 1.0), top_k=max(0, int(said("top_k", 0))),
            min_p=said("min_p", 0.0), repetition_penalty=said("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=None if self.seed is None else (self.seed + choice) % 2**64, stop=tuple(text for text in stop if text),
            stop_token_ids=frozenset(self.stop_token_ids or ()), ignore_eos=self.ignore_eos,
            logprobs=self.told_logprobs,
        )  # fmt: skip


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _says_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: Input should be greater than 0, except with echo", param="max_tokens")
        return self

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as given."""
        single = isinstance(self.prompt, str) or (bool(self.prompt) and isinstance(self.prompt[0], int))
        return [self.prompt] if single else self.prompt  # type: ignore[return-value]


class TokenizeRequest(BaseModel):
    """`POST /tokenize`."""

    model: str | None = None
    prompt: str = Field(max_length=2**20)
    add_special_tokens: bool = True


class CalledFunction(BaseModel):
    """The function in a call; its arguments are JSON text, but templates expect the object."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return read_json(value or "{}") if isinstance(value, str) else value


class MadeCall(BaseModel):
    """A tool call in a turn of the model."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One turn, with content as text or as parts of text, which the chat template joins."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None

    def turn(self) -> dict[str, Any]:
        """For the chat template."""
        for part in self.content if isinstance(self.content, list) else ():
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                what = f"content of type {part.get('type')!r}: this server reads text only"
                raise ApiError(400, what, param="messages")
        thought = self.reasoning or self.reasoning_content
        thoughts = {"reasoning": thought, "reasoning_content": thought} if thought else {}  # templates read either
        said = self.model_dump(exclude_none=True, exclude={"reasoning", "reasoning_content"})
        return {**said, **thoughts, "content": self.content or ""}


class ToolFunction(BaseModel):
    """A function that the model can call; templates render what they know of its `parameters`."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1)


class Tool(BaseModel):
    """`strict` of a function has no effect: calls are parsed, not enforced."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: ToolFunction


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    """Default as in OpenAI: `auto` if there are tools. Calls cannot be forced."""
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs: true", param="top_logprobs")
        return self

    @property
    def told_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """For the chat template; empty if the model must not call any."""
        return [] if self.tool_choice == "none" else [tool.model_dump() for tool in self.tools or ()]

    @property
    def most_calls(self) -> float:
        return 0 if not self.callable_tools else 1 if self.parallel_tool_calls is False else math.inf

    def turns(self) -> list[dict[str, Any]]:
        """For the chat template."""
        return [message.turn() for message in self.messages]
