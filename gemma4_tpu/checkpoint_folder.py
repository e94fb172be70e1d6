"""A checkpoint's folder, local or gs://: the model that its `config.json` describes, and what is missing. Imports no
JAX.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gemma4_tpu.architectures import ARCHITECTURES, Architecture, contradictions, from_hf_config, seeing
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.paths import local_folder
from gemma4_tpu.config.schema import ModelConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hf_config import UNQUANTISED, quantisation
from gemma4_tpu.storage import is_remote, join, list_folder, open_bytes, read_json

RANDOM = "random:"
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_NAME, TOKENIZER_CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_NAME, GENERATION_NAME = "chat_template.jinja", "generation_config.json"
PROBE_NAME = "probe.json"
"""File in a merged folder with prompts on which it and its base differ."""


@dataclass(frozen=True)
class BaseFound:
    """The base model that a configuration names."""

    arch: Architecture
    folder: str | None
    """Local or gs:// folder of the checkpoint; None for random weights."""
    seed: int | None
    """Seed of random weights; None for a checkpoint."""


def find_base(model: ModelConfig, *, remote: bool) -> BaseFound:
    """Finds the base model that `model` names; a `config.json` determines the architecture.

    Args:
      model: `model.name` and `model.path`.
      remote: also look into remote folders; otherwise assume that they have the named architecture.

    Raises:
      UserError: the architecture or path is unknown, there is no checkpoint (or a PEFT adapter, or another format), or
        it contradicts `model.name`.
    """
    named = ARCHITECTURES.get(model.name)
    if named is None:
        hint = did_you_mean(model.name, ARCHITECTURES, lambda name: f"model={name}")
        raise UserError(f"model.name={model.name}: no such architecture{hint} (there are: {', '.join(ARCHITECTURES)})")
    if not model.path:
        raise UserError(
            f"model.path: {named.name} needs its checkpoint; set model.path=<folder with the Hugging Face checkpoint>"
            f" (local or gs://), or model.path={RANDOM}0 to try without weights"
        )
    if model.path.startswith(RANDOM):
        seed = model.path.removeprefix(RANDOM)
        if not seed.isdecimal():
            raise UserError(f"model.path={model.path}: write {RANDOM}SEED, such as {RANDOM}0")
        return BaseFound(named, None, int(seed))
    place, messages = local_folder(f"model.path={model.path}", model.path)
    if messages:
        raise UserError(messages[0])
    folder = str(place) if place else model.path.rstrip("/")
    if place is None and not remote:
        return BaseFound(named, folder, None)
    try:
        return BaseFound(_architecture(folder, named), folder, None)
    except UserError as error:
        raise UserError(f"model.path={model.path}: {error}") from None


def checkpoint_architecture(model: ModelConfig, *, pictures: bool = False) -> tuple[Architecture | None, list[str]]:
    """The architecture that `model` refers to, and problems with its checkpoint, as far as local files show.

    `pictures`: whether it must read pictures.
    """
    try:
        found = find_base(model, remote=False)
        return (seen_with(found, remote=False) if pictures else found).arch, []
    except UserError as error:
        return ARCHITECTURES.get(model.name), [str(error)]


def seen_with(found: BaseFound, *, remote: bool) -> BaseFound:
    """The base with its vision settings.

    Args:
      found: from `find_base`.
      remote: as there; what cannot be inspected, random weights included, is assumed to be as in the released size.

    Raises:
      UserError: the weights are random, or the checkpoint cannot read pictures.
    """
    if not remote and (found.folder is None or is_remote(found.folder)):
        return replace(found, arch=seeing(found.arch, None))
    if found.folder is None:
        raise UserError(
            f"model.path={RANDOM}{found.seed}: random weights have no vision tower; use a checkpoint, or leave out"
            " data.image_cache"
        )
    try:
        return replace(found, arch=seeing(found.arch, read_config(found.folder)))
    except UserError as error:
        raise UserError(f"model.path={found.folder}: {error}") from None


def read_config(folder: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder, local or gs://.

    Raises:
      UserError: there is none, or the folder contains something other than a model; says what.
    """
    present = list_folder(folder)
    if "config.json" not in present or "adapter_config.json" in present:
        raise UserError(no_checkpoint(folder, present))
    return read_json(join(folder, "config.json"))


def no_checkpoint(folder: str, present: list[str]) -> str:
    """Why a folder with the files `present` is not a loadable checkpoint, and what to do."""
    if not present:
        return f"{folder}: no such folder, or an empty one; expected a Hugging Face checkpoint"
    if {"snapshots", "refs"} <= set(present):
        return f"{folder}: a model's folder in the Hugging Face cache; give the one below it, snapshots/<revision>"
    endings = {
        "adapter_config.json": "a PEFT adapter, not a model; use the folder of its base model",
        ".gguf": "GGUF weights, which are quantised for inference; use the original safetensors checkpoint",
        ".bin": "pickled PyTorch weights; load and save them with transformers to convert them to safetensors",
        ".safetensors": f"weights, but not all of config.json and {SINGLE_NAME} or its index; copy those too",
    }
    for ending, meaning in endings.items():
        if found := [name for name in present if name.endswith(ending)]:
            return f"{folder}: holds {found[0]}: {meaning}"
    config = "" if "config.json" in present else "config.json and no "
    return f"{folder}: has no {config}{SINGLE_NAME} or {INDEX_NAME}; found {', '.join(present[:10])}"


def tokenizer_problem(model: ModelConfig) -> list[str]:
    """Problems with the tokenizer's folder."""
    if model.tokenizer is None and (model.path or "").startswith(RANDOM):
        return []
    key = "model.tokenizer" if model.tokenizer is not None else "model.path"
    path = model.tokenizer if model.tokenizer is not None else model.path or ""
    folder, messages = local_folder(f"{key}={path}", path)
    if folder is not None and not messages:
        try:
            messages = no_tokenizer(f"{key}={path}", str(folder))
        except UserError as error:  # a damaged file
            messages = [f"{key}={path}: {error}"]
    return messages


def no_tokenizer(given: str, folder: str) -> list[str]:
    """What a folder, local or remote, lacks of a tokenizer that renders conversations; messages begin with `given`."""
    if TOKENIZER_NAME not in list_folder(folder):
        return [f"{given}: there is no {TOKENIZER_NAME}; set model.tokenizer=<folder with the tokenizer>"]
    if chat_template(folder) is None:
        return [
            f"{given}: the tokenizer has no chat template ({TEMPLATE_NAME}); use an instruction-tuned checkpoint's"
            f" tokenizer (model.tokenizer=<folder>), or put a {TEMPLATE_NAME} next to it"
        ]
    return []


def chat_template(folder: str) -> str | None:
    """The chat template that transformers finds in a tokenizer's folder, local or remote; None if there is none.

    Raises:
      UserError: `tokenizer_config.json` is damaged.
    """
    present = list_folder(folder)
    if TEMPLATE_NAME in present:
        file = open_bytes(join(folder, TEMPLATE_NAME))
        return bytes(file.read(0, file.size_bytes)).decode("utf-8", "replace").strip() or None
    if TOKENIZER_CONFIG_NAME not in present:
        return None
    given = read_json(join(folder, TOKENIZER_CONFIG_NAME)).get("chat_template")
    if isinstance(given, list):  # several, by name
        given = next((entry.get("template") for entry in given if entry.get("name") == "default"), None)
    return given if isinstance(given, str) and given else None


def recognise(folder: str) -> str:
    """Name of this project's architecture that the checkpoint in a folder, local or remote, has.

    Raises:
      UserError: there is no checkpoint, it cannot be trained, or no size matches; names the nearest one and the
        differences.
    """
    found = _described(folder)
    differences = {name: contradictions(arch, found) for name, arch in ARCHITECTURES.items()}
    nearest = min(differences, key=lambda name: len(differences[name]))
    if differences[nearest]:
        raise UserError(
            f"config.json: matches no architecture of this project; the nearest is {nearest}"
            f" ({'; '.join(differences[nearest])})"
        )
    return nearest


def _architecture(folder: str, named: Architecture) -> Architecture:
    found = replace(_described(folder), name=named.name)
    if differences := contradictions(named, found):
        fitting = [a.name for a in ARCHITECTURES.values() if not contradictions(a, found)]
        advice = f"give model={fitting[0]}" if fitting else "it matches no architecture of this project"
        raise UserError(f"not a checkpoint of {named.name}; {advice} ({'; '.join(differences)})")
    return found


def _described(folder: str) -> Architecture:
    """The architecture that the `config.json` of a checkpoint folder describes."""
    config, present = read_config(folder), list_folder(folder)
    if SINGLE_NAME not in present and INDEX_NAME not in present:
        raise UserError(no_checkpoint(folder, present))
    if method := quantisation(config):
        raise UserError(f"config.json: a checkpoint quantised with {method}; {UNQUANTISED}")
    try:
        return from_hf_config(config)
    except (AttributeError, TypeError, ValueError) as error:  # for example, a list instead of an object
        if isinstance(error, UserError):
            raise
        raise UserError(f"config.json is damaged: {error}") from None
