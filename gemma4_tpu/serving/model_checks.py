"""Checks of the folder that is served: a whole checkpoint, of a size that vLLM has a model for. No JAX."""

from __future__ import annotations

import json
from pathlib import Path

from gemma4_tpu.architectures import Architecture, from_hf_config
from gemma4_tpu.checkpoint_folder import INDEX_NAME, SINGLE_NAME, no_checkpoint
from gemma4_tpu.config.serving import ServingConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.hardware import LOCAL, SLICES
from gemma4_tpu.hf_config import UNIFIED
from gemma4_tpu.tracking.run import is_run

MERGED, ADAPTER = "merged", "adapter"
"""Folders in a run folder: what `merge` leaves."""


def platform_of(serving: ServingConfig) -> str:
    """What serves: `tpu`, `gpu` or `cpu`."""
    return "cpu" if serving.slice == LOCAL else SLICES[serving.slice].chip.platform


def find_model(run: str, *, mounted: bool) -> tuple[Path | None, Architecture | None, list[str]]:
    """The folder to mount and its architecture, or what is wrong."""
    if not run:
        return None, None, ["run: which model? give run=<merged folder>, or run=<run folder> with merged in it"]
    if "://" in run:
        return None, None, [f"run={run}: copy it to a local disk first; vLLM is given a local folder"]
    folder = Path(run)
    if not folder.is_dir():
        advice = f"; download it first: hf download {run} --local-dir <folder>" if run.count("/") == 1 else ""
        return None, None, [f"run={run}: no such folder{advice}"]
    if is_run(folder) and not (folder / MERGED).is_dir():
        there = f", but an adapter: adapters=[{run}] serves that" if (folder / ADAPTER).is_dir() else ""
        return None, None, [
            f"run={run}: a training without merged weights{there}; merge it first: python -m gemma4_tpu.merge run={run}"
        ]  # fmt: skip
    model = folder / MERGED if is_run(folder) else folder
    present = sorted(entry.name for entry in model.iterdir())
    if "adapter_config.json" in present:
        return None, None, [f"run={run}: an adapter; adapters=[{run}] serves it on its base"]
    if "config.json" not in present or not {SINGLE_NAME, INDEX_NAME} & set(present):
        return None, None, [f"run={run}: {no_checkpoint(str(model), present)}"]
    try:
        architecture = from_hf_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    except (UserError, ValueError, AttributeError, TypeError) as error:
        return None, None, [f"run={run}: {error}"]
    return model, architecture, [f"run={run}: {told}" for told in _lacking(model, present, mounted=mounted)]


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


def longest_problem(serving: ServingConfig, model: Path) -> list[str]:
    """Whether the model takes sequences of the wanted length."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    longest = config.get("text_config", config).get("max_position_embeddings")
    if isinstance(longest, int) and serving.max_model_len > longest:
        return [f"serving.max_model_len={serving.max_model_len}: the model's longest sequence is {longest} tokens"]
    return []


def on_tpu(serving: ServingConfig, model: Path) -> list[str]:
    """Checkpoints that vLLM's JAX implementation has no model for, or was seen to refuse."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if serving.env.get("MODEL_IMPL_TYPE") == "vllm":
        return []
    if config.get("model_type") in UNIFIED:
        return [
            f"config.json: model_type={config['model_type']} (12B) is none of the models of tpu-inference 0.32, vLLM's"
            " JAX implementation; serving.env.MODEL_IMPL_TYPE=vllm takes vLLM's PyTorch one (as serving=v6e4_12b does)"
        ]
    return [] if "text_config" in config else [
        "config.json is that of a text-only checkpoint (no text_config), which vLLM's JAX implementation of Gemma 4 was"
        " seen to refuse; merge onto the multimodal checkpoint that Google publishes if it does"
    ]  # fmt: skip
