"""The base model that a configuration names: its architecture, where its weights and tokenizer are, what identifies it.

Reads `config.json` and headers only, local or gs://, and needs no JAX.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES, Architecture, contradictions, from_hf_config
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.tensorfile import Checkpoint, no_checkpoint
from gemma4_tpu.storage import is_remote, join, list_folder, read_json

RANDOM = "random:"
RANDOM_TOKENIZER = "embedded:tiny"
"""Tokenizer of random weights unless `model.tokenizer` names another."""


@dataclass(frozen=True)
class Base:
    """A base model, found but not loaded."""

    arch: Architecture
    folder: str | None
    """Local or gs:// folder of the checkpoint; None for random weights."""
    seed: int | None
    """Seed of random weights; None for a checkpoint."""
    tokenizer_folder: str

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened: every header is read and checked.

        Raises:
          UserError: a shard is missing or damaged; ValueError: the weights are random.
        """
        if self.folder is None:
            raise ValueError("random weights have no checkpoint")
        return Checkpoint(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this base from any other; see `Checkpoint.fingerprint`."""
        if self.folder is not None:
            return self.checkpoint.fingerprint
        return hashlib.sha256(f"random {self.seed} {self.arch}".encode()).hexdigest()


def resolve_base(model: ModelConfig) -> Base:
    """Finds the base model that `model` names.

    Raises:
      UserError: no path, no checkpoint there (a PEFT adapter, other formats), or one that contradicts `model.name`.
    """
    named = ARCHITECTURES.get(model.name)
    if named is None:
        raise UserError(f"model.name={model.name}: no such architecture; there are: {', '.join(ARCHITECTURES)}")
    if not model.path:
        raise UserError(
            f"model.path: {named.name} needs its checkpoint; give the folder of a Hugging Face checkpoint (local or"
            f" gs://), or {RANDOM}0 for random weights"
        )
    if model.path.startswith(RANDOM):
        tokenizer = assets.resolve(model.tokenizer or RANDOM_TOKENIZER)
        return Base(named, None, _seed(model.path), tokenizer)
    folder = _folder(model.path)
    try:
        found = _architecture(read_config(folder), named)
    except UserError as error:
        raise UserError(f"model.path={model.path}: {error}") from None
    return Base(found, folder, None, assets.resolve(model.tokenizer) if model.tokenizer else folder)


def read_config(folder: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder.

    Raises:
      UserError: there is none, or the folder holds something else than a model; says what.
    """
    present = list_folder(folder)
    if "config.json" not in present or "adapter_config.json" in present:
        raise UserError(no_checkpoint(folder, present))
    return read_json(join(folder, "config.json"))


def _seed(path: str) -> int:
    seed = path.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise UserError(f"model.path={path}: write {RANDOM}SEED with a whole number, such as {RANDOM}0")
    return int(seed)


def _folder(path: str) -> str:
    resolved = assets.resolve(path)
    if is_remote(resolved):
        return resolved.rstrip("/")
    place = Path(resolved).expanduser()
    if place.is_dir():
        return str(place)
    if place.exists():
        raise UserError(f"model.path={path}: is a file; give the folder it lies in")
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        hint = f"; if that is a model's name, download it first: hf download {path} --local-dir <folder>"
    raise UserError(f"model.path={path}: no such folder{hint}")


def _architecture(config: dict[str, Any], named: Architecture) -> Architecture:
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else quantisation
        raise UserError(
            f"config.json: a checkpoint quantised with {method}; give the original weights (lora.quantize=nf4 or int8"
            " quantises them when they are loaded)"
        )
    found = from_hf_config(config, name=named.name)
    if differences := contradictions(named, found):
        fitting = [a.name for a in ARCHITECTURES.values() if not contradictions(a, found)]
        advice = f"give model={fitting[0]}" if fitting else "it is none of the architectures known here"
        raise UserError(f"the checkpoint is not a {named.name}; {advice} ({'; '.join(differences)})")
    return found
