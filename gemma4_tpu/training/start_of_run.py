"""A run's adapters in the form that `lora.start` takes: by the weights' names on disk, like PEFT's adapters."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import yaml

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.load import from_yaml
from gemma4_tpu.config.schema import LoraConfig, TrainRoot
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.adapter_files import Given, Whole
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.names import Tensor, adapted_tensors
from gemma4_tpu.tracking.records import broken_certificate, read_record
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.began import open_plain
from gemma4_tpu.training.saved import SavedState, open_saved
from gemma4_tpu.training.start_in_full import of_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfRun:
    """The trained values of a run's checkpoint."""

    source: str
    """A description."""
    sha256: str
    base: str | None
    """Fingerprint of its base."""
    weights: Mapping[str, Given]
    whole: Mapping[str, Whole]


def read_run(lora: LoraConfig, arch: Architecture) -> OfRun:
    """The adapters of the run `lora.start`.

    Raises:
      UserError: it has none, or they do not fit this model.
    """
    run = RunFolder.existing(str(lora.start), key="lora.start")
    config = run.read_config()
    if "lora" not in config:
        raise UserError(f"lora.start={lora.start}: its config.yaml has no lora: not the folder of a training run")
    known: TrainRoot = from_yaml(yaml.safe_dump({"lora": config["lora"]}, sort_keys=False))
    if not known.lora.enabled:
        raise UserError(
            f"lora.start={lora.start}: trained every weight (lora=none), so there are no adapters; merge it and give"
            " model.path=<merged folder>"
        )
    if broken := broken_certificate(run.path):
        log.warning("lora.start=%s: its on-policy certificate does not hold: %s", lora.start, broken)
    saved = open_saved(run.address, lora.start_checkpoint, key="lora.start", which_key="lora.start_checkpoint")
    state, plain = open_plain(saved, known.lora)
    base = None
    if run.provenance_path.exists():
        base = (read_record(run.provenance_path).values.get("fingerprints") or {}).get("base")
    try:
        adapted = Layout.of(arch, plain).adapted
    except UserError as problem:
        raise UserError(f"lora.start={lora.start}: not adapters for {arch.name}; its config.yaml: {problem}") from None
    tensors = adapted_tensors(arch, adapted)
    given: dict[str, Given] = {}
    for name in state.names:
        if (own := name.removesuffix("_lora_a")) != name:
            given |= (
                _of_tensor(state, tensors[own], adapted[own].scale) if own in adapted else {own: _absent(state, name)}
            )
    source = f"update {state.update} of {run.address}"
    return OfRun(source, state.identity, base, given, of_run(state, arch))


def _of_tensor(state: SavedState, tensor: Tensor, scale: float) -> dict[str, Given]:
    shape = state.shape(tensor.lora_names[0])
    each, rank = shape[: len(tensor.weight.each)], shape[-1]
    a_size, b_size = (math.prod(state.shape(name)) // math.prod(each) // rank for name in tensor.lora_names)
    shapes = (*each, rank, a_size), (*each, b_size // len(tensor.hf_names), rank)

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        lora_a, lora_b = (state.read(own) for own in tensor.lora_names)
        return tensor.lora_factors(lora_a, lora_b)[name]

    def magnitude(name: str) -> np.ndarray:
        return tensor.magnitudes(state.read(tensor.magnitude_name))[name]

    dora = tensor.magnitude_name in state.names
    return {
        name: Given(*shapes, scale, partial(read, name), partial(magnitude, name) if dora else None)
        for name in tensor.hf_names
    }


def _absent(state: SavedState, name: str) -> Given:
    """Of a layer that this model lacks, where its scale does not matter."""
    other = name.removesuffix("a") + "b"
    return Given(state.shape(name), state.shape(other), 1.0, lambda: (state.read(name), state.read(other)))
