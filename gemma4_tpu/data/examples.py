"""Tokenised examples in flat arrays, between rendering and packing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemma4_tpu.data.drops import Origin
from gemma4_tpu.data.pictures import Picture


@dataclass(frozen=True)
class Examples:
    """N tokenised examples; example i owns `tokens[offsets[i]:offsets[i + 1]]`: n + 1 ids, n slots of a packed row.

    An example of a pair consists of two sequences that share a row; each has one id more than it takes slots.
    """

    tokens: np.ndarray
    """int32 [S]: token ids of all examples, concatenated."""
    flags: np.ndarray
    """bool [S]: True where predicting this token counts in the loss."""
    offsets: np.ndarray
    """int64 [N + 1]: where each example starts."""
    source: np.ndarray
    """int16 [N]: index into `weights`."""
    weights: tuple[float, ...]
    """How often an epoch visits the rows of each source."""
    files: tuple[str, ...]
    """Names of the files that rows came from."""
    file: np.ndarray
    """int32 [N]: index into `files`."""
    row: np.ndarray
    """int64 [N]: 1-based row number within that file."""
    second: np.ndarray | None = None
    """int64 [N]: index within its ids where each example's second sequence begins; None if examples have one sequence.
    """
    pictures: tuple[tuple[str, ...], ...] | None = None
    """[N]: keys of each example's pictures, in the order of their soft tokens; None if there are no pictures."""
    picture_tokens: int = 0
    """Soft tokens of all pictures."""
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further arrays of an update by name, each with a value for every token: [S], or [S, …]. A value is placed where
    its token is the target. Only where examples are of one sequence each.
    """
    fingerprint: dict[str, str] = field(default_factory=dict)
    """What the examples were made from (rows, tokenizer, template, policies), by name."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return f"{len(self):,} examples, {len(self.tokens):,} tokens"

    @property
    def slots(self) -> np.ndarray:
        """int64 [N]: slots that each example takes in a packed row, one less than the ids of each of its sequences."""
        return np.diff(self.offsets) - (1 if self.second is None else 2)

    @property
    def targets(self) -> np.ndarray:
        """int64 [N]: target tokens of each example (the first token of a sequence is never a target)."""
        total = np.concatenate([[0], np.cumsum(self.flags, dtype=np.int64)])
        return total[self.offsets[1:]] - total[self.offsets[:-1] + 1]

    def origin(self, index: int) -> Origin:
        """Where example `index` came from."""
        return Origin(self.files[self.file[index]], int(self.row[index]))

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n + 1], flags bool [n + 1]) of example `index`."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.flags[part]

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, flags) of each sequence of example `index`, which become the segments of its row."""
        ids, flags = self.example(index)
        if self.second is None:
            return [(ids, flags)]
        cut = self.second[index]
        return [(ids[:cut], flags[:cut]), (ids[cut:], flags[cut:])]

    def lengths(self, indices: list[int] | np.ndarray) -> np.ndarray:
        """int64: slots of each segment in a row that holds these examples."""
        if self.second is None:
            return self.slots[indices]
        first = self.second[indices] - 1
        return np.stack([first, self.slots[indices] - first], axis=1).reshape(-1)


class ExamplesBuilder:
    """Collects examples into flat arrays; takes about 5 bytes per token while it grows."""

    def __init__(self, weights: list[float]):
        self._weights = tuple(weights)
        self._tokens: list[np.ndarray] = []
        self._flags: list[np.ndarray] = []
        self._source: list[int] = []
        self._file: list[int] = []
        self._row: list[int] = []
        self._second: list[int] = []
        self._pictures: list[tuple[str, ...]] = []
        self._picture_tokens = 0
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def add(
        self, ids: np.ndarray, flags: np.ndarray, source: int, origin: Origin, second: int = 0,
        pictures: Sequence[Picture] = (),
    ) -> None:  # fmt: skip
        """Appends one example: `ids` int32 [n + 1] with `flags` bool [n + 1], from source number `source`.

        `second` is where its second sequence begins (set for all examples or for none).
        """
        self._tokens.append(np.asarray(ids, np.int32))
        self._flags.append(np.asarray(flags, bool))
        self._source.append(source)
        self._file.append(self._files.setdefault(origin.file, len(self._files)))
        self._row.append(origin.row)
        self._second.append(second)
        self._pictures.append(tuple(picture.key for picture in pictures))
        self._picture_tokens += sum(picture.tokens for picture in pictures)

    def build(self, fingerprint: dict[str, str]) -> Examples:
        """The finished store; a hash of its contents joins `fingerprint` as `examples`."""
        lengths = np.array([len(ids) for ids in self._tokens], np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.concatenate([np.zeros(0, np.int32), *self._tokens])
        flags = np.concatenate([np.zeros(0, bool), *self._flags])
        source = np.array(self._source, np.int16)
        digest = hashlib.sha256()
        second = np.array(self._second, np.int64)
        pairs = [second] if second.any() else []
        for array in (tokens, flags, offsets, source, np.array(self._weights), *pairs):
            digest.update(np.ascontiguousarray(array).tobytes())
        pictures = tuple(self._pictures) if any(self._pictures) else None
        if pictures is not None:
            digest.update(repr(pictures).encode())
        return Examples(
            tokens=tokens,
            flags=flags,
            offsets=offsets,
            source=source,
            weights=self._weights,
            files=tuple(self._files),
            file=np.array(self._file, np.int32),
            row=np.array(self._row, np.int64),
            second=second if pairs else None,
            pictures=pictures,
            picture_tokens=self._picture_tokens,
            fingerprint={**fingerprint, "examples": digest.hexdigest()},
        )
