"""Whether the files and folders that a configuration names are there, and what model a checkpoint folder holds.

Only looks at local files; what lies on gs:// or in a Hugging Face data set shows when it is read.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path

from gemma4_tpu import assets
from gemma4_tpu.architectures import ARCHITECTURES, Architecture, contradictions, from_hf_config
from gemma4_tpu.config.keys import did_you_mean
from gemma4_tpu.config.schema import DataSource, ModelConfig
from gemma4_tpu.errors import UserError

RANDOM = "random:"
HUGGING_FACE = "hf:"
GCS = "gs://"


def checkpoint_architecture(model: ModelConfig) -> tuple[Architecture | None, list[str]]:
    """The architecture that `model` stands for and what is wrong with its checkpoint.

    A readable `config.json` decides; weights that are random or not local have the named architecture.
    """
    named = ARCHITECTURES.get(model.name)
    if named is None:
        hint = did_you_mean(model.name, ARCHITECTURES, lambda name: f"model={name}")
        return None, [f"model.name={model.name}: no such architecture{hint} (there are: {', '.join(ARCHITECTURES)})"]
    if model.path is None:
        return named, [
            f"model.path: {named.name} needs its checkpoint; give model.path=<folder with the Hugging Face checkpoint> "
            "(local or gs://), or model.path=random:0 to try without weights"
        ]
    if model.path.startswith(RANDOM):
        seed = model.path.removeprefix(RANDOM)
        return named, [] if seed.isdecimal() else [f"model.path={model.path}: write random:SEED, such as random:0"]
    folder, messages = _folder(f"model.path={model.path}", model.path)
    if folder is None or messages:
        return named, messages
    return _read_architecture(model, named, folder)


def tokenizer_problem(model: ModelConfig) -> list[str]:
    """What is wrong with the tokenizer's folder, if anything."""
    if model.tokenizer is None and (model.path or "").startswith(RANDOM):
        return []
    key = "model.tokenizer" if model.tokenizer is not None else "model.path"
    path = model.tokenizer if model.tokenizer is not None else model.path or ""
    folder, messages = _folder(f"{key}={path}", path)
    if folder is not None and not messages and not (folder / "tokenizer.json").is_file():
        return [f"{key}={path}: there is no tokenizer.json; give model.tokenizer=<folder with the tokenizer>"]
    return messages


def source_problem(key: str, source: DataSource) -> list[str]:
    """What is wrong with a data source, if anything; `key` is its place, such as `data.train.0`."""
    messages = [] if source.weight > 0 else [f"{key}.weight={source.weight}: must be more than 0"]
    path = source.path
    if not path:
        return [*messages, f"{key}.path is empty; give {key}.path=<rows.jsonl[.gz], .parquet, a folder or hf:NAME>"]
    if path.startswith(HUGGING_FACE) and "://" not in path:
        return messages if path != HUGGING_FACE else [*messages, f"{key}.path={path}: write hf:NAME or hf:NAME:SPLIT"]
    place, found = local_place(f"{key}.path={path}", path)
    messages += found
    if place is not None and not place.exists():
        hub = f"; a Hugging Face data set is written hf:{path}" if path.count("/") == 1 and not place.suffix else ""
        messages.append(f"{key}.path={path}: no such file or folder{_sibling(place)}{hub}")
    return messages


def _read_architecture(model: ModelConfig, named: Architecture, folder: Path) -> tuple[Architecture, list[str]]:
    given, config = f"model.path={model.path}", folder / "config.json"
    if not config.is_file():
        return named, [f"{given}: there is no config.json; give a folder with a checkpoint of {named.name}"]
    if not any(folder.glob("*.safetensors")):
        return named, [f"{given}: there are no *.safetensors files; give the folder that holds the weights"]
    try:
        found = from_hf_config(json.loads(config.read_text(encoding="utf-8")), name=named.name)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # unreadable, no JSON, not Gemma 4
        damaged = "" if isinstance(error, UserError) else "config.json is damaged: "
        return named, [f"{given}: {damaged}{error}"]
    differences = contradictions(named, found)
    if not differences:
        return found, []
    fitting = [a.name for a in ARCHITECTURES.values() if not contradictions(a, found)]
    advice = f"give model={fitting[0]}" if fitting else "no architecture of this project fits it"
    return named, [f"{given}: not a checkpoint of {named.name}; {advice} ({'; '.join(differences)})"]


def _folder(given: str, path: str) -> tuple[Path | None, list[str]]:
    """The local folder behind `path`; None for one that is not local."""
    place, messages = local_place(given, path)
    if place is None or messages:
        return None, messages
    if place.is_dir():
        return place, []
    what = "is a file, not a folder" if place.exists() else f"no such folder{_sibling(place)}"
    return None, [f"{given}: {what}; give a local or gs:// folder, or embedded:tiny"]


def local_place(given: str, path: str) -> tuple[Path | None, list[str]]:
    """Where a local or embedded path lies; None for gs:// and the like, whose files show when they are read."""
    if path.startswith(GCS) and importlib.util.find_spec("gcsfs") is None:
        return None, [f"{given}: gs:// needs gcsfs; pip install 'gemma4-tpu[gcp]'"]
    if "://" in path:
        return None, []
    try:
        return Path(assets.resolve(path)), []
    except UserError as error:
        return None, [f"{given.split('=')[0]}={error}"]


def _sibling(place: Path) -> str:
    try:
        names = [entry.name for entry in place.parent.iterdir()]
    except OSError:
        return f" (nor is there a folder {place.parent})"
    near = difflib.get_close_matches(place.name, names, n=1)
    return f"; did you mean {place.parent / near[0]}?" if near else ""
