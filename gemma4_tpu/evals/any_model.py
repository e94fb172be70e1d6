"""Resolves a path to a model, from a run or a plain checkpoint; finds it first, and loads it when needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jax.sharding import Mesh

from gemma4_tpu import assets
from gemma4_tpu.checkpoint_folder import RANDOM, recognise
from gemma4_tpu.config.schema import LoraConfig, ModelConfig
from gemma4_tpu.config.tasks import EvalConfig, ExportConfig
from gemma4_tpu.data.tokenizer import load_tokenizer
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.evaluated_models import as_computed, weights_as_they_are, weights_of
from gemma4_tpu.evals.generate import Weights
from gemma4_tpu.export.trained import Trained, open_trained
from gemma4_tpu.models.audit import audit
from gemma4_tpu.models.base import Base, resolve_base
from gemma4_tpu.storage import list_folder


@dataclass(frozen=True)
class AnyModel:
    """A model that is found but not loaded. Made by `find_model`."""

    base: Base
    trained: Trained | None
    """The run's trained values; None for a checkpoint."""

    @property
    def lora(self) -> LoraConfig:
        """The configuration of its adapters; for a checkpoint, one without adapters."""
        return as_computed(self.trained).lora if self.trained else LoraConfig(enabled=False)

    @property
    def identity(self) -> str:
        """Distinguishes it from any other model."""
        return self.base.fingerprint + (f" {self.trained.state.identity}" if self.trained else "")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.base.tokenizer_folder, self.base.new_tokens)

    def load(self, mesh: Mesh, compute_dtype: str, *, adapters: bool = True) -> Weights:
        """Loads its weights onto the mesh; `adapters=False` leaves out what a run trained."""
        config = replace(EvalConfig(), compute_dtype=compute_dtype)
        if self.trained is None:
            return weights_as_they_are(self.base, config, mesh)
        return weights_of(self.trained, config, mesh)[adapters]


def find_model(place: str, *, checkpoint: str = "latest", model: str | None = None, pictures: bool = False) -> AnyModel:
    """Finds the model that commands accept as `run=` or `model.path=`.

    Args:
      place: a run folder, or a Hugging Face checkpoint, local or gs://; `embedded:NAME`, `random:SEED`.
      checkpoint: for a run: `latest`, `best` (lowest held-out loss) or an update number.
      model: name of the architecture; only random weights need it.
      pictures: for a checkpoint: whether prompts can contain pictures. A run reads them if it was trained on them.

    Raises:
      UserError: there is no model, or its parts do not fit together.
    """
    if not is_checkpoint(place):
        trained = open_trained(place, ExportConfig(checkpoint=checkpoint))
        return AnyModel(trained.base, trained)
    name = model or ("" if place.startswith(RANDOM) else recognise(assets.resolve(place)))
    base = resolve_base(ModelConfig(name=name, path=place), pictures=pictures)
    audit(base).enforce()
    return AnyModel(base, None)


def is_checkpoint(place: str) -> bool:
    """Whether it is a checkpoint rather than a run. Raises: UserError: it is neither."""
    if place.startswith((RANDOM, assets.PREFIX)):
        return True
    present = list_folder(place)
    if "config.json" not in present and "config.yaml" not in present:
        raise UserError(f"{place}: neither a checkpoint (no config.json) nor a run folder (no config.yaml); give one")
    return "config.json" in present
