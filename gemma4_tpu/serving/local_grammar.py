"""`response_format`: answers in JSON, or JSON of a schema, by llguidance's grammars.

Schemas come from outside, and a few lines of one can keep the library busy for hours: a separate process tries it
first.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from gemma4_tpu.serving.local_process import LimitedProcess, Worker, WorkRefused

CPU_SECONDS = 2.0
"""Limit per schema; real ones take milliseconds."""
SCHEMA_CHARACTERS = 65_536
"""Limit for a schema's length: time per token grows with it, to about half a second."""
SPACE = r"( |\n[ \t]{0,40})?"
"""White space between JSON's parts: as people and programs write it, but bounded, because small models get lost
in it.
"""
_SHOWN = 300  # characters of the library's own message


class AnswerGrammar:
    """The position of one answer in its grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def copy(self) -> AnswerGrammar:
        """A copy at the same position."""
        return AnswerGrammar(self._matcher.deep_copy())

    def allowed(self, besides: Iterable[int] = ()) -> np.ndarray:
        """[V] bool: the tokens that can come next, and those in `besides`.

        Raises:
          WorkRefused: there is none, or the grammar takes too long.
        """
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0
        self._check()
        mask[list(besides)] = True
        return mask

    def take(self, token: int) -> None:
        """Advances by one token of the answer."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_over(self) -> bool:
        """Whether nothing more can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise WorkRefused(" ".join(self._matcher.get_error().split())[:_SHOWN])


class Grammars:
    """Builds grammars for one tokenizer; every method can be called from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int]):
        """Prepares grammars over a vocabulary.

        Args:
          tokenizer: the checkpoint's own.
          vocabulary: number of tokens that the model knows.
          ends: tokens that can end an answer.
        """
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._lock = threading.Lock()
        self._lexicon: Any = None
        self._trial: LimitedProcess | None = None

    def of_schema(self, schema: Mapping[str, Any] | bool) -> AnswerGrammar:
        """The grammar of a schema, at its start.

        Raises:
          WorkRefused: the schema is unsupported or too expensive, or the library is not installed.
        """
        if find_spec("llguidance") is None:
            raise WorkRefused("it needs llguidance: pip install 'gemma4-tpu[local-serving]'")
        written = json.dumps(schema)
        if len(written) > SCHEMA_CHARACTERS:
            raise WorkRefused(f"the schema has {len(written)} characters, more than {SCHEMA_CHARACTERS}")
        with self._lock:
            if self._trial is None:
                self._trial = LimitedProcess(__name__, {}, cpu_seconds=CPU_SECONDS)
            if self._lexicon is None:
                from llguidance.hf import from_tokenizer  # takes about a second for Gemma 4's vocabulary

                self._lexicon = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)
        self._trial.ask({"schema": written})
        grammar = AnswerGrammar(_matcher(self._lexicon, written))
        grammar.allowed()  # schemas that allow nothing fail here
        return grammar

    def close(self) -> None:
        """Ends the process in which schemas are tried."""
        if self._trial is not None:
            self._trial.close()


def _matcher(lexicon: Any, schema: str) -> Any:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": SPACE})
    return LLMatcher(lexicon, grammar, log_level=0)


def worker(about: Mapping[str, Any]) -> Worker:
    """The process's task: build the grammar, over a vocabulary of bytes."""
    from llguidance import LLTokenizer

    lexicon = LLTokenizer("byte")

    def make(asked: Mapping[str, Any]) -> dict[str, Any]:
        AnswerGrammar(_matcher(lexicon, asked["schema"])).allowed()
        return {}

    return make
