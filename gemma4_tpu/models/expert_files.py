"""Converts between the adapters of experts in memory and the two formats on disk. Imports no JAX.

`fused`: PEFT adapts the parameters `experts.gate_up_proj` and `experts.down_proj` (its `target_parameters`) by wrapping
their module once for each, so that the first pair is called `experts.base_layer.lora_A`. One matrix holds the A of all
experts `[E·r, in]`, expert by expert, and one their B `[out, r·E]`, rank by rank, with the expert index fastest (as in
`ParamWrapper.get_delta_weight` of PEFT 0.21). `per_expert`: a pair for each matrix of each expert, as if it were a
module (`experts.7.gate_proj.lora_A`), which vLLM loads without conversion.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

FORMS = ("fused", "per_expert")
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The matrices that each parameter of the module `experts` holds; parameters in the order in which PEFT wraps them."""
_OF_ONE = re.compile(r"(?P<module>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)")
_INNER = ".base_layer"

Pair = tuple[np.ndarray, np.ndarray]
"""A and B."""


def to_files(parameter: str, a: np.ndarray, b: np.ndarray, form: str) -> Iterator[tuple[str, Pair]]:
    """Yields the modules in which a parameter's adapter is stored, each with its A `[r, in]` and B `[out, r]`.

    Args:
      parameter: `layers.3.experts.gate_up_proj`.
      a: `[E, r, in]`.
      b: `[E, out, r]`.
      form: one of `FORMS`.
    """
    module, _, own = parameter.rpartition(".")
    if form == "fused":
        inner = _INNER if own == next(iter(PARTS)) else ""
        yield f"{module}{inner}", (a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1))
        return
    for expert, matrices in enumerate(modules(parameter, len(a))):
        for name, own_b in zip(matrices, np.split(b[expert], len(matrices)), strict=True):
            yield name, (a[expert], own_b)


def modules(parameter: str, experts: int) -> list[list[str]]:
    """For each expert, the names of a parameter's matrices in the per-expert format."""
    module, _, own = parameter.rpartition(".")
    return [[f"{module}.{expert}.{part}" for part in PARTS[own]] for expert in range(experts)]


def from_fused(a: np.ndarray, b: np.ndarray, rank: int) -> Pair:
    """The inverse of the fused form: A `[E, r, in]` and B `[E, out, r]`."""
    return a.reshape(-1, rank, a.shape[-1]), b.reshape(len(b), rank, -1).transpose(2, 0, 1)


def from_experts(parts: Sequence[Sequence[Pair]]) -> Pair:
    """Inverts the per-expert format. If gate and up have separate A matrices, their ranks add up.

    Args:
      parts: for each matrix of the parameter, the pairs of all experts.
    """
    stacked = [tuple(np.stack(factors) for factors in zip(*pairs, strict=True)) for pairs in parts]
    (first, _), *others = stacked
    if all(np.array_equal(first, a) for a, _ in others):
        return first, np.concatenate([b for _, b in stacked], axis=1)
    out_size, ranks = sum(b.shape[1] for _, b in stacked), sum(a.shape[1] for a, _ in stacked)
    made = np.zeros((len(first), out_size, ranks), np.float32)
    row = column = 0
    for a, b in stacked:
        made[:, row : row + b.shape[1], column : column + a.shape[1]] = b
        row, column = row + b.shape[1], column + a.shape[1]
    return np.concatenate([a for a, _ in stacked], axis=1), made


def parameter_of(module: str, targets: Sequence[str]) -> str | None:
    """Which of `PARTS` a wrapped module of the fused format refers to; None if it is a module of its own.

    Args:
      module: its path in the base model, `….experts.base_layer` or `….experts`.
      targets: PEFT's `target_parameters`.
    """
    whole = module.removesuffix(_INNER)
    if whole.rpartition(".")[2] != "experts":
        return None
    found = [own for own in PARTS if any(f".{whole}.{own}".endswith(f".{target}") for target in targets)]
    if not found:
        return None
    return found[0] if module.endswith(_INNER) or len(found) == 1 else found[1]


def by_parameter(modules: Sequence[str]) -> Mapping[str, list[list[str]]]:
    """Groups the modules of the per-expert format: parameter → for each of its matrices, the modules of all experts in
    order.

    Raises:
      ValueError: an expert lacks a matrix that others have; names it.
    """
    found: dict[str, dict[tuple[int, str], str]] = {}
    for module in modules:
        if one := _OF_ONE.fullmatch(module):
            own = next(name for name, parts in PARTS.items() if one["part"] in parts)
            found.setdefault(f"{one['module']}.{own}", {})[int(one["expert"]), one["part"]] = module
    grouped = {}
    for parameter, given in found.items():
        experts = range(max(expert for expert, _ in given) + 1)
        wanted = [[(expert, part) for expert in experts] for part in PARTS[parameter.rpartition(".")[2]]]
        if missing := [key for row in wanted for key in row if key not in given]:
            module = parameter.rpartition(".")[0]
            raise ValueError(f"{module}.{missing[0][0]}.{missing[0][1]}")
        grouped[parameter] = [[given[key] for key in row] for row in wanted]
    return grouped
