"""Which weights get an adapter, and how: what `lora` says, weight by weight. No JAX here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.weights import ROLES, Weight, rows


@dataclass(frozen=True)
class Adapted:
    """The adapter of one weight of one layer: it adds scale · (x·A)·B."""

    rank: int
    """r, the inner dim of A and B."""
    scale: float


OfLayer = tuple[tuple[str, Adapted], ...]
"""The adapted weights of a layer, by their names without `layers.N.`; two layers with equal ones are adapted alike."""


def adapted(arch: Architecture, lora: LoraConfig | None) -> tuple[OfLayer, ...]:
    """Of each layer. All of the targeted roles, global layers' K included; the router and experts have none.

    Raises:
      UserError: adapters are asked for, and no weight gets one.
    """
    if lora is None or not lora.enabled:
        return ((),) * arch.num_layers
    found = tuple(
        tuple((weight.name, _adapted(weight, lora)) for weight in rows(arch, layer) if weight.role in lora.targets)
        for layer in range(arch.num_layers)
    )
    if not any(found):
        raise UserError(f"lora.targets={lora.targets} adapts no module; use some of {sorted(ROLES)}")
    return found


def _adapted(weight: Weight, lora: LoraConfig) -> Adapted:
    rank = lora.rank
    return Adapted(rank, lora.alpha / (math.sqrt(rank) if lora.rslora else rank))
