"""Checks of the folder that is served: a whole checkpoint, of a size that vLLM has a model for. No JAX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import ARCHITECTURES, Architecture, from_hf_config, to_hf_config
from gemma4_tpu.checkpoint_folder import INDEX_NAME, SINGLE_NAME, no_checkpoint
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.hf_config import UNIFIED, quantisation
from gemma4_tpu.storage import join, list_folder, open_bytes, read_json
from gemma4_tpu.tracking.run import is_run

MERGED, ADAPTER = "merged", "adapter"
"""Folders in a run folder: what `merge` leaves."""


@dataclass(frozen=True)
class FoundModel:
    """The checkpoint that is served."""

    folder: Path
    """As vLLM's mount shows it, or where it lies."""
    architecture: Architecture
    config: Mapping[str, Any]
    """Its `config.json`."""

    quantised_bytes: int | None = None
    """Of the weights' files, where they are quantised."""

    @property
    def quantised_by(self) -> str | None:
        """The method that its weights are quantised by."""
        return quantisation(self.config)

    @property
    def weight_only(self) -> bool:
        """compressed-tensors holds weights in eight bits, and activations stay as they are."""
        groups = (self.config.get("quantization_config") or {}).get("config_groups") or {}
        return any(
            not group.get("input_activations") and (group.get("weights") or {}).get("num_bits") == 8
            for group in groups.values()
        )


def platform_of(serving: ServingConfig) -> str:
    """What serves: `tpu`, `gpu` or `cpu`."""
    return "cpu" if serving.slice == LOCAL else SLICES[serving.slice].chip.platform


def find_model(run: str, *, mounted: bool) -> tuple[FoundModel | None, list[str]]:
    """What is to be served, or what is wrong with it. `mounted`: into a container."""
    if not run:
        return None, ["run: which model? give run=<merged folder>, or run=<run folder> with merged in it"]
    if "://" in run:
        return None, [f"run={run}: copy it to a local disk first; vLLM is given a local folder"]
    folder = Path(run)
    if not folder.is_dir():
        advice = f"; download it first: hf download {run} --local-dir <folder>" if run.count("/") == 1 else ""
        return None, [f"run={run}: no such folder{advice}"]
    if is_run(folder) and not (folder / MERGED).is_dir():
        there = f", but an adapter: adapters=[{run}] serves that" if (folder / ADAPTER).is_dir() else ""
        return None, [
            f"run={run}: a training without merged weights{there}; merge it first: python -m gemma4_tpu.merge run={run}"
        ]
    model = folder / MERGED if is_run(folder) else folder
    present = sorted(entry.name for entry in model.iterdir())
    if "adapter_config.json" in present:
        return None, [f"run={run}: an adapter; adapters=[{run}] serves it on its base"]
    if "config.json" not in present or not {SINGLE_NAME, INDEX_NAME} & set(present):
        return None, [f"run={run}: {no_checkpoint(str(model), present)}"]
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        architecture = from_hf_config(config)
    except (UserError, ValueError, AttributeError, TypeError) as error:
        return None, [f"run={run}: {error}"]
    lacking = [f"run={run}: {told}" for told in _lacking(model, present, mounted=mounted)]
    return FoundModel(model, architecture, config, _quantised_bytes(config, str(model))), lacking


def find_in_bucket(run: str, architecture: str | None) -> tuple[FoundModel | None, list[str]]:
    """The same for a folder on gs://, which stays there."""
    if not run.startswith("gs://") or run.count("/") < 3:
        return None, [f"run={run}: GKE reads the model from its bucket; give run=gs://<bucket>/<merged folder>"]
    if architecture is not None:
        if architecture not in ARCHITECTURES:
            return None, [f"architecture={architecture}: no such size (there are: {', '.join(ARCHITECTURES)})"]
        config = {"model_type": "gemma4", "text_config": to_hf_config(ARCHITECTURES[architecture])}
        return FoundModel(Path(run), ARCHITECTURES[architecture], config), []
    try:
        config = read_json(join(run, "config.json"))
        return FoundModel(Path(run), from_hf_config(config), config, _quantised_bytes(config, run)), []
    except (UserError, OSError) as error:
        return None, [f"run={run}: {error}; architecture=<size> does without reading it"]


def _quantised_bytes(config: Mapping[str, Any], folder: str) -> int | None:
    """What the files of quantised weights hold; None: they are not quantised."""
    if quantisation(config) is None:
        return None
    names = (name for name in list_folder(folder) if name.endswith(".safetensors"))
    return sum(open_bytes(join(folder, name)).size_bytes for name in names)


def _lacking(model: Path, present: list[str], *, mounted: bool) -> list[str]:
    """What the server would not find in the folder, be it `mounted` into a container."""
    messages = []
    if "tokenizer.json" not in present:
        messages.append("there is no tokenizer.json; copy the tokenizer's files there")
    inside = model.resolve()
    outside = [n for n in present if (model / n).is_symlink() and inside not in (model / n).resolve().parents]
    if outside and mounted:
        messages.append(
            f"{outside[0]} is a link to a place that the container doesn't see; copy the folder with cp -rL"
        )
    if mounted and "," in str(model.absolute()):
        messages.append("a folder with a comma in its path can't be mounted; move it")
    if INDEX_NAME in present:
        index = json.loads((model / INDEX_NAME).read_text(encoding="utf-8"))
        missing = sorted(set(index.get("weight_map", {}).values()) - set(present))
        if missing:
            messages.append(f"{INDEX_NAME} names {missing[0]}, which is not there ({len(missing)} missing)")
    return messages


def longest_problem(serving: ServingConfig, model: FoundModel) -> list[str]:
    """Whether the model takes sequences of the wanted length."""
    longest = model.config.get("text_config", model.config).get("max_position_embeddings")
    if isinstance(longest, int) and serving.max_model_len > longest:
        return [f"serving.max_model_len={serving.max_model_len}: the model's longest sequence is {longest} tokens"]
    return []


def quantised_problems(serving: ServingConfig, model: FoundModel) -> list[str]:
    """What a quantised checkpoint leaves no choice about."""
    if (method := model.quantised_by) is None:
        return []
    messages = []
    if serving.runner == "embedded":
        messages.append(
            f"run: quantised by {method}: serving=local computes with plain weights; give the merged folder"
        )
    elif model.weight_only and platform_of(serving) == "cpu":
        messages.append(
            "run: weight-only quantised: vLLM 0.32's CPU build has no kernel for 8 bits without quantised activations;"
            " export=int8 has them"
        )
    if serving.weight_dtype == "fp8":
        messages.append(f"serving.weight_dtype=fp8: the weights are quantised by {method} already; leave it out")
    return messages


def on_tpu(serving: ServingConfig, model: FoundModel) -> list[str]:
    """Checkpoints that vLLM's JAX implementation has no model for, or was seen to refuse."""
    config = model.config
    if serving.env.get("MODEL_IMPL_TYPE") == "vllm":
        return []
    if config.get("model_type") in UNIFIED:
        return [
            f"config.json: model_type={config['model_type']} (12B) is none of the models of tpu-inference 0.32, vLLM's"
            " JAX implementation; serving.env.MODEL_IMPL_TYPE=vllm takes vLLM's PyTorch one (as serving=v6e4_12b does)"
        ]
    notes = [] if "text_config" in config else [
        "config.json is that of a text-only checkpoint (no text_config), which vLLM's JAX implementation of Gemma 4 was"
        " seen to refuse; merge onto the multimodal checkpoint that Google publishes if it does"
    ]  # fmt: skip
    if model.weight_only:
        notes.append("weight-only quantised: whether tpu-inference 0.32 reads that is not known; export=fp8 is read")
    elif model.quantised_by and config["quantization_config"].get("format") == "int-quantized":
        notes.append(
            "int8 weights: vLLM's JAX implementation read fp8 (export=fp8) before int8, which came with tpu-inference"
            " #3305; if this image's refuses them, serving.env.MODEL_IMPL_TYPE=vllm takes vLLM's PyTorch model"
        )
    return notes
