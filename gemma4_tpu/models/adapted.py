"""Decides which weights get an adapter, and how: applies `lora` to each weight. Imports no JAX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.in_full import is_in_full
from gemma4_tpu.models.weights import MODULES, ROLES, Weight, rows, sizes

_LAYERS = re.compile(r"(?P<first>-?\d+)(?P<range>-(?P<last>-?\d+)?)?")


@dataclass(frozen=True)
class Adapted:
    """The adapter of one weight of one layer, which adds scale · (x·A)·B."""

    rank: int
    """r, the inner dim of A and B."""
    scale: float
    pieces: tuple[int, ...] = (0,)
    """Indices of the weight's pieces on disk that get it; of keys and values, possibly only the values."""
    dora: bool = False
    """Also train the lengths of the weight's rows (see `dora.py`)."""


OfLayer = tuple[tuple[str, Adapted], ...]
"""The adapted weights of a layer, by name without `layers.N.`; layers with equal ones are adapted alike."""


def adapted(arch: Architecture, lora: LoraConfig | None) -> tuple[OfLayer, ...]:
    """The adapters of each layer. The router gets none, nor do weights that are trained in full.

    Raises:
      UserError: `lora.layers`, `lora.targets` or `lora.ranks` name something that this model lacks, or no weight is
        adapted.
    """
    if lora is None or not lora.enabled:
        return ((),) * arch.num_layers
    ranks = _Ranks(lora)
    layers = adapted_layers(lora.layers, arch.num_layers)
    found = tuple(
        tuple(_of_layer(arch, lora, ranks, layer)) if layer in layers else () for layer in range(arch.num_layers)
    )
    if not any(found):
        where = "" if lora.layers is None else f" in lora.layers=[{','.join(lora.layers)}]"
        if lora.modules_to_train:
            where += f" that lora.modules_to_train=[{','.join(lora.modules_to_train)}] leaves"
        known = ", ".join([*ROLES, *MODULES])
        raise UserError(f"lora.targets=[{','.join(lora.targets)}] adapts no module{where}; use some of {known}")
    if idle := [pattern for pattern in lora.ranks if pattern not in ranks.used]:
        raise UserError(
            f"lora.ranks: {', '.join(idle)}: matches no adapted module; patterns are compared with whole names"
            " such as layers.3.self_attn.q_proj or with their ends (q_proj, mlp.*), and the first match counts"
        )
    return found


def adapted_layers(given: list[str] | None, num_layers: int) -> list[int]:
    """The layers that `lora.layers` names, such as `[0-11,24,-6-]`; None: all.

    Raises:
      UserError: an item is not a layer or range of layers, or this model lacks them.
    """
    if given is None:
        return list(range(num_layers))
    found: set[int] = set()
    for item in given:
        if (match := _LAYERS.fullmatch(str(item).strip())) is None:
            raise UserError(
                f"lora.layers: {item!r}: give layers (24; -1 is the last) and ranges with both ends (0-11), or with an"
                " open end (24-; the last six: -6-)"
            )
        first = int(match["first"])
        last = first if match["range"] is None else int(match["last"] or num_layers - 1)
        first, last = (end + num_layers if end < 0 else end for end in (first, last))
        if not 0 <= first <= last < num_layers:
            raise UserError(f"lora.layers: {item!r}: not layers of this model, which are 0-{num_layers - 1}")
        found |= set(range(first, last + 1))
    return sorted(found)


def _of_layer(arch: Architecture, lora: LoraConfig, ranks: _Ranks, layer: int) -> Iterator[tuple[str, Adapted]]:
    for weight in rows(arch, layer):
        pieces = tuple(
            i for i, module in enumerate(weight.modules) if weight.role in lora.targets or module in lora.targets
        )
        if weight.role and pieces and not is_in_full(weight, lora):
            otherwise = expert_rank(arch, lora) if weight.each else lora.rank
            rank = ranks.of(weight, layer, pieces, otherwise)
            if takes_part(lora) and rank > (most := _most_ranks(arch, layer, weight, len(pieces))):
                raise UserError(
                    f"lora.init={lora.init}: rank {rank}, but layers.{layer}.{weight.hf_names[pieces[0]]} has only"
                    f" {most}; give a lower lora.rank, or this weight another (lora.ranks)"
                )
            yield weight.name, Adapted(rank, lora.alpha / scaled_by(rank, lora.rslora), pieces, lora.dora)


def _most_ranks(arch: Architecture, layer: int, weight: Weight, pieces: int) -> int:
    """The maximal rank of a weight, or of `pieces` of its pieces together."""
    size = sizes(arch, layer) | {"c": pieces}
    return min(math.prod(size[dim] for dim in dims) for dims in (weight.inputs, weight.outputs))


def takes_part(lora: LoraConfig) -> bool:
    """Whether adapters start as a part of their weights (PiSSA, OLoRA), which is then subtracted from the frozen
    weights.
    """
    return lora.enabled and lora.init != "default"


def as_plain(lora: LoraConfig) -> LoraConfig:
    """The equivalent plain adapters on unmodified weights: twice the rank, same scale."""
    ranks = {pattern: 2 * rank for pattern, rank in lora.ranks.items()}
    alpha = lora.alpha * scaled_by(2, lora.rslora)
    return replace(lora, init="default", rank=2 * lora.rank, alpha=alpha, ranks=ranks)


def expert_rank(arch: Architecture, lora: LoraConfig) -> int:
    """Rank of each expert's adapter. By default, the ranks of the experts that a token passes through add up to
    `lora.rank`.
    """
    return lora.expert_rank or max(1, lora.rank // arch.experts_per_token)


def scaled_by(rank: int, rslora: bool) -> float:
    """The divisor of alpha: the rank, or its square root with rsLoRA."""
    return math.sqrt(rank) if rslora else rank


class _Ranks:
    """Ranks by `lora.ranks`; records which of its patterns were used."""

    def __init__(self, lora: LoraConfig):
        self._lora = lora
        self.used: set[str] = set()

    def of(self, weight: Weight, layer: int, pieces: tuple[int, ...], otherwise: int) -> int:
        names = [f"layers.{layer}.{weight.hf_names[i].removesuffix('.weight')}" for i in pieces]
        ranks = {name: self._of_module(name, otherwise) for name in names}
        if len(set(ranks.values())) > 1:
            told = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
            raise UserError(f"lora.ranks: {told}: these share A; give both the same rank, or adapt only one of them")
        return ranks[names[0]]

    def _of_module(self, name: str, otherwise: int) -> int:
        for pattern, rank in self._lora.ranks.items():
            if any(fnmatchcase(short, end) for short in (name, name.removesuffix("_proj")) for end in _ends(pattern)):
                self.used.add(pattern)
                return rank
        return otherwise


def _ends(pattern: str) -> tuple[str, str]:
    return pattern, f"*.{pattern}"
