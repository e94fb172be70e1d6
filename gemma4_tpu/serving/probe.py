"""Verifies that a running server serves the trained model, with prompts on which merged and base model differ.

`merge` stores them in the merged folder (`probe.json`): the tokens of a prompt, and each model's most likely next token
in float32. The server answers with one token each; with quantised weights, it can match neither.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from gemma4_tpu.checkpoint_folder import PROBE_NAME
from gemma4_tpu.errors import UserError
from gemma4_tpu.tracking.records import read_checked
from gemma4_tpu.tracking.typed import COUNT, fields, listed

ANSWER_SECONDS = 300.0
"""For one token; a first request can trigger compilation."""
_PROMPTS = fields({"prompts": listed(fields({"tokens": listed(COUNT), "merged": COUNT, "base": COUNT}))})


@dataclass(frozen=True)
class ProbeResult:
    """How the server answered."""

    prompts: int
    as_merged: int
    as_base: int
    told: str
    """In words."""

    def plain(self) -> dict[str, Any]:
        """For `result.json`."""
        return asdict(self)


def probe(client: httpx.Client, name: str, folder: Path) -> ProbeResult | None:
    """Asks the server behind `client`; None if `folder` contains no prompts.

    Raises:
      UserError: it answers like the base model, or not at all.
    """
    path = folder / PROBE_NAME
    if not path.is_file():
        return None
    stored = _stored(path)
    if not stored:
        return None
    answers = []
    for one in stored:
        body = {
            "model": name, "prompt": one["tokens"], "max_tokens": 1, "temperature": 0, "logprobs": 1,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answers.append(_token(client, body))
    return _judge(name, stored, answers)


def _stored(path: Path) -> list[dict[str, Any]]:
    """Raises `UserError` where the file is damaged."""
    found = read_checked(path, _PROMPTS, "merge again, or serving.probe=false skips the check")
    return list(found["prompts"])


def _token(client: httpx.Client, body: dict[str, Any]) -> int:
    """The id of the single token that the server answers with."""
    try:
        response = client.post("/v1/completions", json=body, timeout=ANSWER_SECONDS)
        response.raise_for_status()
        (text,) = response.json()["choices"][0]["logprobs"]["tokens"]
        return int(text.removeprefix("token_id:"))
    except httpx.HTTPStatusError as error:
        said = " ".join(error.response.text.split())[:200]
        raise UserError(
            f"the server refuses the probe ({error.response.status_code}: {said}); serving.probe=false skips it"
        ) from None
    except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"the server does not answer the probe ({error or repr(error)}); serving.probe=false skips it"
        ) from None


def _judge(name: str, stored: list[dict[str, Any]], answers: list[int]) -> ProbeResult:
    as_merged = sum(answer == one["merged"] for one, answer in zip(stored, answers, strict=True))
    as_base = sum(answer == one["base"] for one, answer in zip(stored, answers, strict=True))
    count = f"{len(stored)} stored prompt{'s' * (len(stored) > 1)}"
    if as_base > len(stored) / 2:
        raise UserError(
            f"{name}: the server answers {as_base} of {count} like the base model and {as_merged} like the merged one:"
            " it does not serve the trained model; is the folder unchanged? (serving.probe=false skips this"
            " check)"
        )
    told = f"answers {as_merged} of {count} like the merged model, {as_base} like the base"
    return ProbeResult(len(stored), as_merged, as_base, told)
