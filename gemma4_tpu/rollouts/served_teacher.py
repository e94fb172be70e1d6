"""What a teacher behind a server tells of given rows: its likeliest tokens at every target, kept for all runs.

```
<objective.teacher_store>/<teacher>.jsonl   {"row": digest of its token ids, "tokens", "logprobs"}
```

`tokens` are int32 and `logprobs` float32 bits (base64, little-endian), [n, K] of the n targets of a row. The server is
asked by token ids for what it thinks of its prompt (`/completions` with `echo`), as vLLM and `gemma4_tpu.serve` tell
it, and by `/tokenize` whether it reads every row's text as the same tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np

from gemma4_tpu.config.schema import ObjectiveConfig
from gemma4_tpu.data.examples import Examples
from gemma4_tpu.errors import UserError
from gemma4_tpu.step.distill import TOP_LOGPROBS, TOP_TOKENS

log = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
AT_ONCE = 8
"""Requests in progress."""
TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_AS_ID = "token_id:"
_KEPT = (("tokens", "<i4"), ("logprobs", "<f4"))


@dataclass(frozen=True)
class ServedTeacher:
    """A server and one of its models, and where what it has told is kept."""

    objective: ObjectiveConfig
    tokenizer: Any
    """The student's."""

    def tell(self, examples: Examples) -> Examples:
        """The examples with the teacher's likeliest tokens and their log-probabilities added.

        Raises:
          UserError: no server answers, or it reports less or has another vocabulary; what it reported before is kept.
        """
        assert self.objective.teacher_store is not None  # the checks
        folder = Path(self.objective.teacher_store)
        folder.mkdir(parents=True, exist_ok=True)
        with open_client() as client:
            model = self.objective.teacher_model or self._only_model(client)
            path = folder / f"{_digest(f'{self.objective.teacher} {model} {self.top}'.encode())}.jsonl"
            known, rows = _read(path), [examples.example(i) for i in range(len(examples))]
            missing = {key: row for row in rows if (key := _key(*row)) not in known}
            log.info("teacher: %s of %s; %d of %d rows to ask", model, self.objective.teacher, len(missing), len(rows))
            with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(AT_ONCE) as threads:
                answers = zip(missing, threads.map(partial(self._ask, client, model), missing.values()), strict=True)
                for number, (key, told) in enumerate(answers, 1):
                    known[key] = told
                    file.write(json.dumps({"row": key, "tokens": _text(told[0]), "logprobs": _text(told[1])}) + "\n")
                    file.flush()
                    if number % 1000 == 0:
                        log.info("teacher: %d of %d rows told", number, len(missing))
        shape = len(examples.tokens), self.top
        tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for i, (ids, flags) in enumerate(rows):
            places = examples.offsets[i] + _targets(flags)
            tokens[places], logprobs[places] = (part.reshape(-1, self.top) for part in known[_key(ids, flags)])
        content = {"teacher": _digest(tokens.tobytes() + logprobs.tobytes())}
        return replace(
            examples, beside={TOP_TOKENS: tokens, TOP_LOGPROBS: logprobs}, fingerprint=examples.fingerprint | content
        )  # fmt: skip

    @property
    def top(self) -> int:
        """K."""
        assert self.objective.teacher_top is not None  # the checks
        return self.objective.teacher_top

    def _only_model(self, client: httpx.Client) -> str:
        listed = self._json(client, "GET", "models").get("data")
        names = [str(one.get("id")) for one in listed or () if isinstance(one, dict)]
        if len(names) != 1:
            self._refuse(f"it has {', '.join(names) or 'no model'}; give objective.teacher_model=<one of them>")
        return names[0]

    def _ask(self, client: httpx.Client, model: str, row: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
        """(tokens int32 [n, K], logprobs float32 [n, K]) of a row's targets."""
        ids, flags = row
        self._compare(client, model, ids)
        body = {
            "model": model, "prompt": ids.tolist(), "echo": True, "logprobs": self.top, "max_tokens": 1,
            "temperature": 0, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = self._json(client, "POST", "completions", body)
        try:
            told = answer["choices"][0]["logprobs"]["top_logprobs"]
            found = [_likeliest(told[place], self.top) for place in _targets(flags)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            self._refuse(
                f"does not tell its {self.top} likeliest tokens at every place of a prompt ({error!r}); give"
                " a server that does (vLLM, python -m gemma4_tpu.serve), or a smaller objective.teacher_top"
            )
        tokens, logprobs = zip(*found, strict=True) if found else ((), ())
        return np.array(tokens, np.int32), np.array(logprobs, np.float32)

    def _compare(self, client: httpx.Client, model: str, ids: np.ndarray) -> None:
        """Whether the server makes the student's tokens of a row's text."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        its = self._json(client, "POST", "../tokenize", body).get("tokens")
        if its != own:
            at = next((i for i, (a, b) in enumerate(zip(own, its or (), strict=False)) if a != b), 0)
            self._refuse(
                f"reads {self.tokenizer.decode(own[at : at + 8])!r} as the tokens {(its or [])[at : at + 8]}, the model"
                f" that is trained as {own[at : at + 8]}; give a teacher with the same vocabulary"
            )

    def _json(self, client: httpx.Client, how: str, where: str, body: Any = None) -> dict[str, Any]:
        try:
            response = client.request(how, str(httpx.URL(f"{self.objective.teacher}/").join(where)), json=body)
            response.raise_for_status()
            answer = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            self._refuse(f"{str(error) or repr(error)}; what it has told is kept, the same command asks for the rest")
        return answer if isinstance(answer, dict) else {}

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"objective.teacher={self.objective.teacher}: {why}")


def open_client() -> httpx.Client:
    """To whichever server; with a key from OPENAI_API_KEY, which is never shown."""
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get(KEY)) else {}
    return httpx.Client(headers=headers, timeout=TIMEOUT)


def _likeliest(told: dict[str, float], top: int) -> tuple[list[int], list[float]]:
    """The K likeliest tokens of a place: ids and log-probabilities, falling; servers add the token that is there."""
    every = ((float(value), int(name.removeprefix(_AS_ID))) for name, value in told.items())
    found = sorted((one for one in every if math.isfinite(one[0])), reverse=True)
    if len(found) < top:
        raise ValueError(f"{len(found)} tokens of {len(told)} with a finite log-probability")
    return [token for _, token in found[:top]], [value for value, _ in found[:top]]


def _targets(flags: np.ndarray) -> np.ndarray:
    """Places of a row's targets; its first token is none."""
    return np.flatnonzero(flags[1:]) + 1


def _key(ids: np.ndarray, flags: np.ndarray) -> str:
    return _digest(ids.tobytes() + flags.tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _read(path: Path) -> dict[str, tuple[np.ndarray, ...]]:
    """What is kept, by row; a torn last line (a run was killed) is cut off."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            parts = (np.frombuffer(base64.b64decode(row[name]), kind) for name, kind in _KEPT)
            found[str(row["row"])] = tuple(parts)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: damaged ({error}); delete that line") from None
    return found
