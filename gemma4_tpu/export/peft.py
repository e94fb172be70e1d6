"""A run's LoRA as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`, written tensor by tensor."""

from __future__ import annotations

import json
import logging
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.errors import UserError
from gemma4_tpu.export.place import Place
from gemma4_tpu.export.trained import Trained
from gemma4_tpu.models.names import Tensor, peft_magnitude_name, peft_names, peft_tensors

log = logging.getLogger(__name__)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes."""
_MODULE = re.compile(r"layers\.(?P<layer>\d+)\.(?P<module>.+)\.weight")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def check_peft(trained: Trained) -> None:
    """Raises `UserError` where there is no adapter to write; reports ranks that vLLM does not take as they are."""
    if not trained.lora.enabled:
        raise UserError(f"export=peft: {trained.run.path} trained every weight (lora=none); give export=merged")
    ranks = {how.rank for how in trained.layout.adapted.values()}
    if warning := vllm_warning(max(ranks)):
        log.warning(warning)
    if trained.lora.dora:
        log.warning("lora.dora: vLLM refuses adapters with use_dora; serve the merged model")
    if len(ranks) > 1:
        log.warning(
            "lora.ranks: vLLM does not read rank_pattern and would scale all adapters as those of rank %d; serve the"
            " merged model",
            trained.lora.rank,
        )


def vllm_warning(rank: int) -> str | None:
    """What to know about serving this rank with vLLM; None: nothing."""
    if rank in VLLM_RANKS:
        return None
    larger = [known for known in VLLM_RANKS if known > rank]
    if not larger:
        return f"lora.rank={rank}: vLLM refuses ranks above {VLLM_RANKS[-1]}; serve the merged model"
    return f"lora.rank={rank}: vLLM refuses --max-lora-rank {rank}; give it --max-lora-rank {larger[0]}"


def write_peft(trained: Trained, place: Place) -> None:
    """Writes the adapter's two files to the staging folder, in float32 as trained; the configuration comes last."""
    with place.create(WEIGHTS) as out:
        out.write(_header(trained))
        for tensor in trained.tensors.values():
            for name, array in _tensors(trained, tensor).items():
                if not np.isfinite(array).all():
                    raise UserError(f"{trained.state.folder}: {name} holds NaN or infinity: the training diverged")
                out.write(array.astype("<f4", copy=False))
        place.finish(WEIGHTS, out)
    with place.create(CONFIG) as out:
        out.write((json.dumps(peft_config(trained), indent=2) + "\n").encode())
        place.finish(CONFIG, out)
    ranks = sorted({how.rank for how in trained.layout.adapted.values()})
    log.info("PEFT adapter of rank %s on %d weights", ", ".join(map(str, ranks)), len(trained.changes))


def peft_config(trained: Trained) -> dict[str, Any]:
    """`adapter_config.json`."""
    lora: LoraConfig = trained.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": trained.base.folder,
        "r": lora.rank,
        "rank_pattern": rank_pattern(trained),
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": target_modules(trained),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def rank_pattern(trained: Trained) -> dict[str, int]:
    """The ranks that are not `lora.rank`, by the names of the modules; alpha is the same for all."""
    ranks = {name: trained.layout.adapted[t.name].rank for t in trained.tensors.values() for name in t.hf_names}
    return {name.removesuffix(".weight"): rank for name, rank in ranks.items() if rank != trained.lora.rank}


def target_modules(trained: Trained) -> str:
    """A regular expression for the adapted modules of the text model only: a list would match vision towers too.

    PEFT takes `layers_to_transform` with a list alone, so that the layers are named here.
    """
    found = [_MODULE.fullmatch(name) for t in trained.tensors.values() for name in t.hf_names]
    local = {match["module"] for match in found if match}
    modules = "|".join(re.escape(name) for name in sorted(local))
    layers = r"\d+"
    if trained.lora.layers is not None:
        layers = f"({'|'.join(map(str, sorted({int(match['layer']) for match in found if match})))})"
    tower = r".*language_model" if "language_model" in trained.prefix else r"(.*\.)?model"
    return rf"{tower}\.layers\.{layers}\.({modules})"


def _tensors(trained: Trained, tensor: Tensor) -> dict[str, np.ndarray]:
    lora_a, lora_b, *magnitude = (trained.state.read(name) for name in trained.factor_names(tensor))
    found = peft_tensors(tensor, lora_a, lora_b, trained.prefix)
    for name, lengths in (tensor.magnitudes(*magnitude) if magnitude else {}).items():
        found[peft_magnitude_name(name, trained.prefix)] = lengths
    return found


def _header(trained: Trained) -> bytes:
    """The safetensors header: shapes are known before any value is read."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in _shapes(trained):
        start = next(reversed(entries.values())).get("data_offsets", [0, 0])[1]
        stop = start + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shapes(trained: Trained) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor, in the order in which they are written."""
    for tensor in trained.tensors.values():
        how, (out_size, in_size) = trained.layout.adapted[tensor.name], tensor.hf_shape
        shapes = [how.rank, in_size], [out_size, how.rank]
        for hf_name in tensor.hf_names:
            yield from zip(peft_names(hf_name, trained.prefix), shapes, strict=True)
        for hf_name in tensor.hf_names if how.dora else ():
            yield peft_magnitude_name(hf_name, trained.prefix), [out_size]
