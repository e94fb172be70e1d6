"""What the responses of an OpenAI-compatible server say: an answer, log-probabilities, models, or why there are none.

The exceptions say what follows: after `ValueError` and `httpx.HTTPStatusError` another attempt, after `RequestRefused`
no sample, after `UserError` the end of the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.store import LENGTH, STOP
from gemma4_tpu.tracking.typed import COUNT

KEY = "OPENAI_API_KEY"
SHOWN = 200
"""Characters of a server's message that are shown."""
_TRY_AGAIN = (408, 409, 425, 429)
"""Status codes that are retried, besides all from 500."""


class RequestRefused(Exception):
    """The server will not answer this request, however often it is sent."""


def check(response: httpx.Response, config: EvalConfig) -> None:
    """Refuses unsuccessful responses.

    Raises:
      UserError: the server refuses everything.
      RequestRefused: it refuses this request.
      httpx.HTTPStatusError: it failed; the next attempt may succeed.
    """
    status = response.status_code
    if response.is_success:
        return
    said = f"{status}: {_start(response)}"
    if status in (401, 403):
        raise UserError(f"eval.endpoint={config.endpoint}: {said}; is {KEY} in the environment right?")
    if status == 404:
        raise UserError(f"eval.endpoint={config.endpoint}: {said}; the base URL usually ends in /v1")
    if status >= 500 or status in _TRY_AGAIN:
        raise httpx.HTTPStatusError(said, request=response.request, response=response)
    raise RequestRefused(said)


def _json(response: httpx.Response) -> Any:
    """The body. Raises: ValueError: it is not JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        raise ValueError(f"{response.status_code} with a body that is not JSON: {_start(response)}") from None


def answer_of(response: httpx.Response) -> tuple[str, str, int | None]:
    """(text, finish, tokens generated) of a response; the text is empty if the model only thought.

    Raises:
      ValueError: the response is not a chat completion.
    """
    match _json(response):
        case {"choices": [{"message": {**message}, **choice}, *_], **rest}:
            text = message.get("content")
            if text is None or isinstance(text, str):
                finish = LENGTH if choice.get("finish_reason") == "length" else STOP
                return text or "", finish, _tokens(rest.get("usage"))
    raise ValueError(f"{response.status_code} without choices[0].message.content: {_start(response)}")


def prompt_logprobs(response: httpx.Response, tokens: int) -> list[float]:
    """Log-probabilities of the `tokens` of an echoed prompt, without the generated token; 0 for the first.

    Raises:
      ValueError: the response contains none.
    """
    match _json(response):
        case {"choices": [{"logprobs": {"token_logprobs": [_, *found]}}, *_]}:
            found = found[: tokens - 1]
            if len(found) == tokens - 1 and all(isinstance(one, int | float) for one in found):
                return [0.0, *found]
    raise ValueError(f"{response.status_code} without a log-probability for each token of the prompt (echo, logprobs)")


def _tokens(usage: Any) -> int | None:
    count = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return count if COUNT(count, "") is None else None


def models_of(response: httpx.Response) -> dict[str, dict[str, Any]]:
    """Model name → entry. Raises: ValueError: the response is not a list of models."""
    match _json(response):
        case {"data": [*models]}:
            named = [model for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]
            return {model["id"]: model for model in named}
    raise ValueError("no {'data': [{'id': …}]}")


def _start(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:SHOWN]
