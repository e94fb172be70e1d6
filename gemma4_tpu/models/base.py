"""Finds the base model that a configuration names: its architecture, weights, tokenizer and fingerprint.

Reads only `config.json` and headers, local or gs://, and imports no JAX.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from gemma4_tpu import assets
from gemma4_tpu.checkpoint_folder import BaseFound, find_base, seen_with
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.new_tokens import NewTokens, places

RANDOM_TOKENIZER = "embedded:tiny"
"""Tokenizer of random weights, unless `model.tokenizer` names another."""


@dataclass(frozen=True)
class Base(BaseFound):
    """A base model, found but not loaded."""

    tokenizer_folder: str
    new_tokens: tuple[str, ...] = ()
    """`model.new_tokens`."""

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
    def token_places(self) -> NewTokens:
        """Where the new tokens go. Raises `UserError` if the tokenizer has no room for them."""
        return places(self.tokenizer_folder, self.new_tokens) if self.new_tokens else NewTokens({}, {})

    @cached_property
    def fingerprint(self) -> str:
        """Distinguishes this base from any other; see `Checkpoint.fingerprint`."""
        if self.folder is not None:
            return self.checkpoint.fingerprint
        return hashlib.sha256(f"random {self.seed} {self.arch}".encode()).hexdigest()


def resolve_base(model: ModelConfig, *, pictures: bool = False) -> Base:
    """Finds the base model that `model` names; with `pictures`, its weights include the projector.

    Raises:
      UserError: there is no path or no checkpoint (or a PEFT adapter, or another format), the checkpoint contradicts
        `model.name`, or it cannot read pictures although it should.
    """
    found = find_base(model, remote=True)
    if pictures:
        found = seen_with(found, remote=True)
    tokenizer = assets.resolve(model.tokenizer) if model.tokenizer else found.folder
    folder = tokenizer or assets.resolve(RANDOM_TOKENIZER)
    return Base(found.arch, found.folder, found.seed, folder, tuple(model.new_tokens))
