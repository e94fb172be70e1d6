"""The answers that the embedded server's engine computes together, with a joint cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from gemma4_tpu.serving.local_sampling import GeneratedAnswer


class DecodingBatch:
    """Answers in progress, one per row, and their cache: every row ends at the same column, shorter ones start later.

    Every layer keeps the whole sequence; the model's mask applies the windows.
    """

    def __init__(self) -> None:
        self.answers: list[GeneratedAnswer] = []
        self._parts: list[DynamicCache] = []  # each with one or more rows, in the order of `answers`

    @property
    def cache(self) -> DynamicCache:
        """One cache of all rows."""
        if len(self._parts) != 1:
            self._parts = [_side_by_side(self._parts)]
        return self._parts[0]

    def mask(self) -> torch.Tensor:
        """[B, cached tokens + 1]: what each row can attend to, the next token included."""
        width = self.cache.get_seq_length() + 1
        lengths = torch.tensor([answer.length for answer in self.answers])
        return (torch.arange(width)[None] >= width - lengths[:, None]).long()

    def join(self, answer: GeneratedAnswer, cache: DynamicCache) -> None:
        """Adds a row with the cache of its prompt."""
        self.answers.append(answer)
        self._parts.append(cache)

    def keep(self, rows: list[int]) -> None:
        """Drops the other rows, and the columns that only they used."""
        if len(rows) == len(self.answers):
            return
        layers = _tensors(self.cache)
        self.answers = [self.answers[row] for row in rows]
        self._parts = []
        if rows:
            width = max(answer.length for answer in self.answers) - 1  # the last token of each is not cached yet
            chosen = torch.tensor(rows)
            self._parts = [_cache([[tensor[chosen, :, -width:] for tensor in layer] for layer in layers])]


def _side_by_side(parts: Sequence[DynamicCache]) -> DynamicCache:
    width = max((part.get_seq_length() for part in parts), default=0)
    rows = [[[_wide(tensor, width) for tensor in layer] for layer in _tensors(part)] for part in parts]
    return _cache([[torch.cat(pair) for pair in zip(*layers, strict=True)] for layers in zip(*rows, strict=True)])


def _tensors(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [B, KV heads, T, D]."""
    layers: list[Any] = cache.layers  # the type allows layers without keys, but Gemma 4 has none
    return [(layer.keys, layer.values) for layer in layers]


def _cache(layers: Sequence[Sequence[torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def _wide(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return pad(tensor, (0, 0, width - tensor.shape[-2], 0))
