"""The prompts of a cell: random token ids, or those of a text; with a shared prefix; in growing sessions.

Prompts share no other prefix, so a server's prefix cache finds what `bench` says and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma4_tpu.config.serving import BenchConfig
from gemma4_tpu.errors import UserError

_ORDINARY = (1000, 255_000)  # Gemma's vocabulary begins and ends with special tokens
_ANYWHERE = (256, 512)  # ordinary tokens in every vocabulary, including the tiny models'
MOST_TEXT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class PromptSource:
    """Where a benchmark's prompts come from."""

    vocabulary: int | None = None
    """Number of the model's token ids; None: unknown."""
    text: np.ndarray | None = None
    """Token ids of `bench.prompts`; None: random ids."""
    shared_tokens: int = 0
    turns: int = 1

    def prompts(
        self, rng: np.random.Generator, count: int, warmup: int, input_tokens: int, output_tokens: int, users: int
    ) -> Iterator[list[int]]:
        """Yields `count` prompts, then `warmup` prompts that belong to no session.

        Args:
          rng: the cell's own.
          count: prompt i belongs to user i mod `users`, whose sessions have `turns` prompts each.
          warmup: number of further prompts.
          input_tokens: length of a first turn's prompt; later turns add this many to the last prompt and its answer.
          output_tokens: length of an answer. Its tokens are not known beforehand, so others take their place.
          users: concurrent users; 1 if there are none.
        """
        shared = self._drawn(rng, self.shared_tokens)
        firsts = self._firsts(rng)
        sessions: dict[int, list[int]] = {}
        for number in range(count + warmup):
            user, turn = number % users, number // users % self.turns
            fresh = [next(firsts), *self._drawn(rng, input_tokens - 1)] if self.text is None else None
            if turn and number < count:
                more = fresh or self._drawn(rng, input_tokens)
                sessions[user] = [*sessions[user], *self._drawn(rng, output_tokens), *more]
            else:
                own = (fresh or self._drawn(rng, input_tokens))[: input_tokens - len(shared)]
                sessions[user] = [*shared, *own]
            yield sessions[user]

    def _drawn(self, rng: np.random.Generator, tokens: int) -> list[int]:
        if self.text is not None:
            return np.take(self.text, rng.integers(len(self.text)) + np.arange(tokens), mode="wrap").tolist()
        return rng.integers(*self._ids, tokens).tolist()

    def _firsts(self, rng: np.random.Generator) -> Iterator[int]:
        """Yields first tokens, distinct while there are enough ids."""
        ids = rng.permutation(np.arange(*self._ids)).tolist()
        while True:
            yield from ids

    @property
    def _ids(self) -> tuple[int, int]:
        return _ORDINARY if self.vocabulary is not None and self.vocabulary > _ORDINARY[1] else _ANYWHERE


def longest_sequence(config: BenchConfig, input_tokens: int, output_tokens: int) -> int:
    """Tokens of a cell's longest prompt and its answer."""
    return config.turns * (input_tokens + output_tokens)


def read_text(path: str) -> str:
    """The text of `bench.prompts`.

    Raises:
      UserError: the file is not UTF-8 text, or empty, or too large.
    """
    place = Path(path)
    if place.stat().st_size > MOST_TEXT_BYTES:
        raise UserError(f"bench.prompts={path}: more than {MOST_TEXT_BYTES:,} bytes; give a part of it")
    try:
        text = place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"bench.prompts={path}: not UTF-8 (byte {error.start}); give a file of text") from None
    if not text.strip():
        raise UserError(f"bench.prompts={path}: contains no text; give a file of text")
    return text
