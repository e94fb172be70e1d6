"""What is exported: a run's trained values, the base they belong to, and which tensor on disk each of them changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml

from gemma4_tpu.checkpoint_folder import RANDOM
from gemma4_tpu.config.load import from_yaml
from gemma4_tpu.config.schema import LoraConfig, ModelConfig, TrainRoot
from gemma4_tpu.config.tasks import ExportConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models import lora as adapters
from gemma4_tpu.models import token_rows
from gemma4_tpu.models.base import Base, resolve_base
from gemma4_tpu.models.layout import Layout
from gemma4_tpu.models.match import Match, fit
from gemma4_tpu.models.names import Tensor, adapted_tensors, full_name, name_map, some
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.weights import EMBEDDING
from gemma4_tpu.tracking.records import broken_certificate, read_record
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.training.began import PlainState, open_plain
from gemma4_tpu.training.saved import SavedState, open_saved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A tensor on disk that training changed."""

    tensor: Tensor
    source: int
    """Which of `tensor.hf_names` it is."""


@dataclass(frozen=True)
class Trained:
    """A run's trained values and their base."""

    run: RunFolder
    state: SavedState
    lora: LoraConfig
    """The configuration of the adapters as plain ones on the base (see `began.py`)."""
    recorded: LoraConfig
    """The run's own configuration."""
    base: Base
    match: Match
    """How the base checkpoint's names correspond to the architecture's."""

    @property
    def prefix(self) -> str:
        """Prefix of the base checkpoint's names."""
        return self.match.prefix

    @property
    def checkpoint(self) -> Checkpoint:
        return self.base.checkpoint

    @property
    def as_trained(self) -> Trained:
        """With the adapters as in training, possibly on weights without the adapters' initial values."""
        state = self.state.as_trained if isinstance(self.state, PlainState) else self.state
        return replace(self, lora=self.recorded, state=state)

    @cached_property
    def layout(self) -> Layout:
        """Layout of the base with this run's adapters."""
        return Layout.of(self.base.arch, self.lora)

    def factor_names(self, tensor: Tensor) -> tuple[str, ...]:
        """Names of the arrays that adapt a tensor: A, B and DoRA's magnitudes."""
        dora = self.layout.adapted[tensor.name].dora
        return (*tensor.lora_names, *([tensor.magnitude_name] if dora else []))

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tunix name → the weights trained in full or in some rows, or the adapted part of a weight."""
        others = {n: t for n, t in name_map(self.base.arch).items() if self.is_in_full(t) or self.rows_of(t)}
        return {**self.adapted, **others}

    @cached_property
    def adapted(self) -> Mapping[str, Tensor]:
        """The weights with adapters: their adapted parts."""
        return adapted_tensors(self.base.arch, self.layout.adapted)

    def is_in_full(self, tensor: Tensor) -> bool:
        """Whether a weight was itself trained, without an adapter."""
        return tensor.weight.name in self.layout.in_full

    @cached_property
    def token_rows(self) -> tuple[int, ...]:
        """Individually trained rows of the embedding: those of new tokens."""
        return token_rows.trained_alone(self.layout, tuple(self.base.token_places.ids.values()))

    def rows_of(self, tensor: Tensor) -> tuple[int, ...]:
        """Individually trained rows of a weight."""
        return self.token_rows if tensor.name == EMBEDDING else ()

    @cached_property
    def changes(self) -> Mapping[str, Change]:
        """Full name on disk → what changes it; a stored output matrix is kept equal to a trained embedding."""
        found = {
            full_name(self.prefix, name): Change(tensor, source)
            for tensor in self.tensors.values()
            for source, name in enumerate(tensor.hf_names)
        }
        if self.match.head and self.match.embedding in found:
            found[self.match.head] = found[self.match.embedding]
        return found


def open_trained(run: str | Path, export: ExportConfig) -> Trained:
    """Opens a run folder, and checks that all of its parts fit together before anything is written.

    Raises:
      UserError: no checkpoint, a base other than the run's, damaged base files, or a rank or set of adapters other than
      the configuration's.
    """
    folder = RunFolder.existing(run)
    config = folder.read_config()
    try:
        recorded = {key: config[key] for key in ("model", "lora")}
        known: TrainRoot = from_yaml(yaml.safe_dump(recorded, sort_keys=False))  # the order of lora.ranks counts
        pictures = config.get("data", {}).get("image_cache") is not None
    except KeyError as error:
        raise UserError(f"run={run}: config.yaml has no {error}: not the folder of a training run") from None
    if broken := broken_certificate(folder.path):
        log.warning("run=%s: its on-policy certificate does not hold: %s", run, broken)
    state = open_saved(folder.address, export.checkpoint)
    base = _base(folder, known.model, export, pictures)
    found = fit(base.arch, base.checkpoint)
    _check_fingerprint(folder, base)
    state, lora = open_plain(state, known.lora)
    trained = Trained(folder, state, lora, known.lora, base, found)
    _check_values(trained)
    if known.lora.quantize and known.lora.enabled:
        log.info("QLoRA: trained on %s weights; exported on the unquantised base", known.lora.quantize)
    if lora is not known.lora:
        log.info(
            "lora.init=%s: exported as plain adapters of rank %d, for the original base", known.lora.init, lora.rank
        )
    return trained


def _base(folder: RunFolder, model: ModelConfig, export: ExportConfig, pictures: bool) -> Base:
    path = export.base or model.path
    if path and path.startswith(RANDOM):
        raise UserError(
            f"run={folder.path}: trained on random weights (model.path={path}), so there is no base; give another run"
        )
    try:
        return resolve_base(replace(model, path=path), pictures=pictures)
    except UserError as refusal:
        given = "export.base" if export.base else "the run's base"
        hint = "" if export.base else "; if it has moved, give export.base=<folder>"
        raise UserError(f"{given}: {refusal}{hint}") from None


def _check_fingerprint(folder: RunFolder, base: Base) -> None:
    try:
        recorded = read_record(folder.provenance_path).values["fingerprints"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder.provenance_path}: does not name the run's base; copy the file again") from None
    if recorded != base.fingerprint:
        raise UserError(
            f"{base.folder}: not the base that {folder.path} was trained on (fingerprint {base.fingerprint[:12]}, the"
            f" run has {recorded[:12]}); give export.base=<folder with the original checkpoint>"
        )


def _check_values(trained: Trained) -> None:
    """Checks that the checkpoint contains exactly the tensors that the configuration trains, in their shapes."""
    lora = trained.lora
    leaves = adapters.trained_leaves(trained.layout, len(trained.base.new_tokens))
    expected = {name: leaf.shape for leaf in leaves for name in leaf.tunix_names}
    where = f"{trained.state.folder}"
    if missing := sorted(expected.keys() - set(trained.state.names)):
        raise UserError(f"{where}: has no {some(missing, 5)}, though the run's config.yaml trains it")
    if unused := sorted(set(trained.state.names) - expected.keys()):
        raise UserError(f"{where}: {some(unused)} would not be used: the run's config.yaml does not train it")
    for name, shape in expected.items():
        if (found := trained.state.shape(name)) != shape:
            rank = f" (lora.rank={lora.rank})" if lora.enabled else ""
            raise UserError(f"{where}: {name} has shape {list(found)}, but config.yaml requires {list(shape)}{rank}")
