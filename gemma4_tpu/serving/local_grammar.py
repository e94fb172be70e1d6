"""`response_format`: answers that are JSON, or JSON of a schema, by llguidance's grammars.

A schema comes from outside, and a few lines of one can take the library hours: a process of its own tries it first.
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
"""For one schema; those in use take milliseconds."""
SCHEMA_CHARACTERS = 65_536
"""Of a schema, at most: the time for a token grows with it, to half a second or so."""
SPACE = r"( |\n[ \t]{0,40})?"
"""Between JSON's parts: what people and programs write, and no end of it, in which small models lose themselves."""
_SHOWN = 300  # characters of the library's own message


class AnswerGrammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def copy(self) -> AnswerGrammar:
        """Another one that stands at the same place."""
        return AnswerGrammar(self._matcher.deep_copy())

    def allowed(self, besides: Iterable[int] = ()) -> np.ndarray:
        """[V] bool: the tokens that may come next, and those `besides`.

        Raises:
          WorkRefused: there is none, or the grammar takes too much time.
        """
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0
        self._check()
        mask[list(besides)] = True
        return mask

    def take(self, token: int) -> None:
        """The answer goes on with it."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_over(self) -> bool:
        """Whether nothing can come any more."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise WorkRefused(self._matcher.get_error().splitlines()[0][:_SHOWN])


class Grammars:
    """Makes the grammars of one tokenizer; every method may be called from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int]):
        """Args:
        tokenizer: the checkpoint's own.
        vocabulary: tokens that the model knows.
        ends: those with which an answer may end.
        """
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._lock = threading.Lock()
        self._lexicon: Any = None
        self._trial: LimitedProcess | None = None

    def of_schema(self, schema: Mapping[str, Any] | bool) -> AnswerGrammar:
        """At its beginning.

        Raises:
          WorkRefused: no such schema can be kept, it takes too much, or the library is not installed.
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
                from llguidance.hf import from_tokenizer  # a second or so for Gemma 4's vocabulary

                self._lexicon = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)
        self._trial.ask({"schema": written})
        grammar = AnswerGrammar(_matcher(self._lexicon, written))
        grammar.allowed()  # some allow nothing, which turns out here
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
    """What the process does: make the grammar, with a vocabulary of bytes."""
    from llguidance import LLTokenizer

    lexicon = LLTokenizer("byte")

    def make(asked: Mapping[str, Any]) -> dict[str, Any]:
        AnswerGrammar(_matcher(lexicon, asked["schema"])).allowed()
        return {}

    return make
