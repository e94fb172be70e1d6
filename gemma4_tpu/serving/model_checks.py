"""Checks of the folder to serve: a complete checkpoint, of a size that vLLM supports. Imports no JAX."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import ARCHITECTURES, Architecture, from_hf_config, to_hf_config
from gemma4_tpu.checkpoint_folder import INDEX_NAME, SINGLE_NAME, no_checkpoint
from gemma4_tpu.config.paths import no_folder
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.hf_config import UNIFIED, quantisation
from gemma4_tpu.storage import join, list_folder, open_bytes, read_json
from gemma4_tpu.tracking.run import is_run

MERGED, ADAPTER = "merged", "adapter"
"""Subfolders that `merge` writes into a run folder."""


@dataclass(frozen=True)
class FoundModel:
    """The checkpoint to serve."""

    folder: Path
    """Its real path, as needed for mounting."""
    architecture: Architecture
    config: Mapping[str, Any]
    """Its `config.json`."""

    quantised_bytes: int | None = None
    """Bytes of the weight files if they are quantised; else None."""

    @property
    def quantised_by(self) -> str | None:
        """The method by which its weights are quantised."""
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
    """The serving platform: `tpu`, `gpu` or `cpu`."""
    return "cpu" if serving.slice == LOCAL else SLICES[serving.slice].chip.platform


def find_model(run: str, *, mounted: bool) -> tuple[FoundModel | None, list[str]]:
    """The model to serve, or the problems with it. `mounted`: into a container."""
    if not run:
        return None, ["run is not set; set run=<merged folder>, or run=<run folder> that contains merged"]
    if "://" in run:
        return None, [f"run={run}: copy it to a local disk first; vLLM needs a local folder"]
    folder = Path(run)
    if not folder.is_dir():
        advice = f"; download it first: hf download {run} --local-dir <folder>" if run.count("/") == 1 else ""
        return None, [f"run={run}: {no_folder(folder)}{advice}"]
    if is_run(folder) and not (folder / MERGED).is_dir():
        there = f", but an adapter: serve it with adapters=[{run}]" if (folder / ADAPTER).is_dir() else ""
        return None, [
            f"run={run}: a run without merged weights{there}; merge it first: python -m gemma4_tpu.merge run={run}"
        ]
    model = folder / MERGED if is_run(folder) else folder
    present = sorted(entry.name for entry in model.iterdir())
    if "adapter_config.json" in present:
        return None, [f"run={run}: an adapter; serve it on its base with adapters=[{run}]"]
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
        return None, [f"run={run}: GKE reads the model from a bucket; set run=gs://<bucket>/<merged folder>"]
    if architecture is not None:
        if architecture not in ARCHITECTURES:
            return None, [f"architecture={architecture}: no such size (there are: {', '.join(ARCHITECTURES)})"]
        config = {"model_type": "gemma4", "text_config": to_hf_config(ARCHITECTURES[architecture])}
        return FoundModel(Path(run), ARCHITECTURES[architecture], config), []
    try:
        config = read_json(join(run, "config.json"))
        return FoundModel(Path(run), from_hf_config(config), config, _quantised_bytes(config, run)), []
    except (UserError, OSError) as error:
        return None, [f"run={run}: {error}; with architecture=<size> it need not be read"]


def _quantised_bytes(config: Mapping[str, Any], folder: str) -> int | None:
    """Bytes of the files of quantised weights; None if they are not quantised."""
    if quantisation(config) is None:
        return None
    names = (name for name in list_folder(folder) if name.endswith(".safetensors"))
    return sum(open_bytes(join(folder, name)).size_bytes for name in names)


def _lacking(model: Path, present: list[str], *, mounted: bool) -> list[str]:
    """What the server would not find in the folder, if `mounted` inside a container."""
    messages = []
    if "tokenizer.json" not in present:
        messages.append("there is no tokenizer.json; copy the tokenizer's files there")
    inside = model.resolve()
    outside = [n for n in present if (model / n).is_symlink() and inside not in (model / n).resolve().parents]
    if outside and mounted:
        messages.append(
            f"{outside[0]} is a link out of the folder, which the container cannot follow; copy the folder with cp -rL"
        )
    if mounted and "," in str(model.absolute()):
        messages.append("a folder with a comma in its path can't be mounted; move it")
    if INDEX_NAME in present:
        index = json.loads((model / INDEX_NAME).read_text(encoding="utf-8"))
        missing = sorted(set(index.get("weight_map", {}).values()) - set(present))
        if missing:
            messages.append(f"{INDEX_NAME} names {missing[0]}, which does not exist ({len(missing)} missing)")
    return messages


def longest_problem(serving: ServingConfig, model: FoundModel) -> list[str]:
    """Whether the model supports sequences of the requested length."""
    longest = model.config.get("text_config", model.config).get("max_position_embeddings")
    if isinstance(longest, int) and serving.max_model_len > longest:
        return [f"serving.max_model_len={serving.max_model_len}: the model's longest sequence is {longest} tokens"]
    return []


def quantised_problems(serving: ServingConfig, model: FoundModel) -> list[str]:
    """Settings that contradict a quantised checkpoint."""
    if (method := model.quantised_by) is None:
        return []
    messages = []
    if serving.runner == "embedded":
        messages.append(f"run: quantised by {method}: serving=local needs plain weights; use the merged folder")
    elif model.weight_only and platform_of(serving) == "cpu":
        messages.append(
            "run: weight-only quantised: vLLM 0.32's CPU build has no kernel for 8 bits without quantised activations;"
            " use export=int8, which has them"
        )
    if serving.weight_dtype == "fp8":
        messages.append(f"serving.weight_dtype=fp8: the weights are already quantised by {method}; leave it out")
    return messages


def on_tpu(serving: ServingConfig, model: FoundModel) -> list[str]:
    """Checkpoints that vLLM's JAX implementation does not support, or was observed to refuse."""
    config = model.config
    if serving.env.get("MODEL_IMPL_TYPE") == "vllm":
        return []
    if config.get("model_type") in UNIFIED:
        return [
            f"config.json: model_type={config['model_type']} (12B) is not in tpu-inference 0.32, vLLM's"
            " JAX implementation; serving.env.MODEL_IMPL_TYPE=vllm selects its PyTorch one (as serving=v6e4_12b does)"
        ]
    notes = [] if "text_config" in config else [
        "config.json describes a text-only checkpoint (no text_config), which vLLM's JAX implementation was"
        " observed to refuse; if it does, merge onto Google's multimodal checkpoint"
    ]  # fmt: skip
    if model.weight_only:
        notes.append("weight-only quantised: whether tpu-inference 0.32 reads that is not known; export=fp8 is read")
    elif model.quantised_by and config["quantization_config"].get("format") == "int-quantized":
        notes.append(
            "int8 weights: vLLM's JAX implementation read fp8 (export=fp8) before int8, which came with tpu-inference"
            " #3305; if this image refuses them, serving.env.MODEL_IMPL_TYPE=vllm selects vLLM's PyTorch model"
        )
    return notes
