"""Checks of `serving.drafter`: whether the folder contains a drafter of the right size. Imports no JAX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.serving import ServingConfig

SPECULATION, MTP = "speculative-config", "mtp"
KINDS = ("gemma4_assistant", "gemma4_unified_assistant")
"""`model_type` of Gemma 4's drafters."""


def speculation(serving: ServingConfig, drafter: str) -> dict[str, Any]:
    """The value of `--speculative-config`; `drafter` is its folder as vLLM sees it."""
    return {"method": MTP, **(serving.flags.get(SPECULATION) or {}), "model": drafter}


def drafter_problems(serving: ServingConfig, arch: Architecture) -> list[str]:
    """Problems with the drafter for a model."""
    given = serving.flags.get(SPECULATION)
    if given is not None and not isinstance(given, dict):
        return [f"serving.flags.{SPECULATION}={given}: give a mapping, such as {{method: ngram, …}}"]
    if serving.drafter is None:
        if (given or {}).get("method") == MTP and "model" not in (given or {}):
            return [
                "serving.drafter: this recipe needs a drafter: set serving.drafter=<folder>, such as"
                " a copy of google/gemma-4-31B-it-assistant"
            ]
        return []
    if "model" in (given or {}):
        return [f"serving.flags.{SPECULATION}: serving.drafter is its model; leave model out"]
    folder = Path(serving.drafter)
    if serving.runner == "docker" and "," in str(folder.absolute()):
        return [f"serving.drafter={folder}: a folder with a comma in its path can't be mounted; move it"]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, width = config.get("model_type"), config.get("backbone_hidden_size")
    except (OSError, ValueError, AttributeError) as error:
        return [f"serving.drafter={folder}: no checkpoint with a config.json ({error})"]
    if kind not in KINDS:
        return [f"serving.drafter={folder}: model_type={kind} is not a Gemma 4 drafter ({', '.join(KINDS)})"]
    if width != arch.embed_dim:
        return [
            f"serving.drafter={folder}: made for a model of width {width}, but this one has {arch.embed_dim}; use the"
            " drafter of the same size"
        ]
    return []
