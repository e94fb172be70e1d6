"""Which weights get an adapter, and how: what `lora` says, weight by weight. No JAX here."""

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
    """The adapter of one weight of one layer: it adds scale · (x·A)·B."""

    rank: int
    """r, the inner dim of A and B."""
    scale: float
    pieces: tuple[int, ...] = (0,)
    """Which of the weight's pieces on disk get it, by number: of keys and values perhaps only the values."""
    dora: bool = False
    """The lengths of the weight's rows are trained too (see `dora.py`)."""


OfLayer = tuple[tuple[str, Adapted], ...]
"""The adapted weights of a layer, by their names without `layers.N.`; two layers with equal ones are adapted alike."""


def adapted(arch: Architecture, lora: LoraConfig | None) -> tuple[OfLayer, ...]:
    """Of each layer. The router has none, nor has what is trained in full.

    Raises:
      UserError: `lora.layers`, `lora.targets` or `lora.ranks` name what this model has not, or no weight is adapted.
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
            f"lora.ranks: {', '.join(idle)}: no adapted module takes its rank from it; patterns are compared with names"
            " such as layers.3.self_attn.q_proj or the end of them (q_proj, mlp.*), the first that fits counts"
        )
    return found


def adapted_layers(given: list[str] | None, num_layers: int) -> list[int]:
    """The layers that `lora.layers` names, such as `[0-11,24,-6-]`; None: all.

    Raises:
      UserError: not a layer or a range of layers, or none of this model.
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
    """The rank of a weight, or of so many of its pieces together."""
    size = sizes(arch, layer) | {"c": pieces}
    return min(math.prod(size[dim] for dim in dims) for dims in (weight.inputs, weight.outputs))


def takes_part(lora: LoraConfig) -> bool:
    """Whether adapters begin as a part of their weights (PiSSA, OLoRA), which the frozen weights then lack."""
    return lora.enabled and lora.init != "default"


def as_plain(lora: LoraConfig) -> LoraConfig:
    """What such adapters are as plain ones beside whole weights: of twice the rank, at the same scale."""
    ranks = {pattern: 2 * rank for pattern, rank in lora.ranks.items()}
    alpha = lora.alpha * scaled_by(2, lora.rslora)
    return replace(lora, init="default", rank=2 * lora.rank, alpha=alpha, ranks=ranks)


def expert_rank(arch: Architecture, lora: LoraConfig) -> int:
    """Of each expert's adapter; by default those that a token passes through have the rank of one product together."""
    return lora.expert_rank or max(1, lora.rank // arch.experts_per_token)


def scaled_by(rank: int, rslora: bool) -> float:
    """What alpha is divided by: the rank, with rsLoRA its root."""
    return math.sqrt(rank) if rslora else rank


class _Ranks:
    """Ranks by `lora.ranks`, and which of its patterns were used."""

    def __init__(self, lora: LoraConfig):
        self._lora = lora
        self.used: set[str] = set()

    def of(self, weight: Weight, layer: int, pieces: tuple[int, ...], otherwise: int) -> int:
        names = [f"layers.{layer}.{weight.hf_names[i].removesuffix('.weight')}" for i in pieces]
        ranks = {name: self._of_module(name, otherwise) for name in names}
        if len(set(ranks.values())) > 1:
            told = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
            raise UserError(f"lora.ranks: {told}: these share A, so give both the same rank, or adapt one of them")
        return ranks[names[0]]

    def _of_module(self, name: str, otherwise: int) -> int:
        for pattern, rank in self._lora.ranks.items():
            if any(fnmatchcase(short, end) for short in (name, name.removesuffix("_proj")) for end in _ends(pattern)):
                self.used.add(pattern)
                return rank
        return otherwise


def _ends(pattern: str) -> tuple[str, str]:
    return pattern, f"*.{pattern}"
