"""Writes a run's LoRA as a PEFT adapter, tensor by tensor: `adapter_config.json` and `adapter_model.safetensors`."""

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
from gemma4_tpu.models import token_rows
from gemma4_tpu.models.adapted import scaled_by
from gemma4_tpu.models.expert_files import modules
from gemma4_tpu.models.names import HEAD, PEFT_PREFIX, Tensor, full_name, peft_magnitude_name, peft_tensors, some

log = logging.getLogger(__name__)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's --max-lora-rank accepts."""
_EXPERT = re.compile(r"\bexperts\.")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SERVING = {
    "fused": "adapters of experts are in PEFT's form; vLLM on GPUs loads export.peft_experts=per_expert (and this form"
    " only with --enable-mixed-moe-lora-format and is_3d_lora_weight); on TPUs serve the merged model",
    "per_expert": "adapters of experts are in the form that vLLM loads on GPUs; PEFT would silently ignore them (it"
    " loads export.peft_experts=fused); on TPUs serve the merged model",
}
"""Form of experts' adapters → what it is for."""


def check_peft(trained: Trained, experts: str) -> None:
    """Raises `UserError` if there is no adapter to write; logs what servers reject.

    Args:
      trained: the run.
      experts: the format of experts' adapters, `export.peft_experts`.
    """
    if not trained.lora.enabled:
        raise UserError(f"export=peft: {trained.run.path} trained every weight (lora=none); give export=merged")
    whole = _whole(trained)
    if parts := [name for name in whole if not name.endswith(".weight")]:
        raise UserError(
            f"export=peft: {trained.run.path} trained {some(parts, 3)} in full, which are not modules, and PEFT saves"
            " whole modules only; give export=merged"
        )
    if whole or trained.token_rows:
        log.warning("vLLM refuses adapters with whole modules or token rows; serve the merged model")
    if warning := vllm_warning(max(how.rank for how in trained.layout.adapted.values())):
        log.warning(warning)
    if trained.lora.dora:
        log.warning("lora.dora: vLLM refuses adapters with use_dora; serve the merged model")
    if len({how.rank for name, how in trained.layout.adapted.items() if not trained.tensors[name].weight.each}) > 1:
        log.warning(
            "lora.ranks: vLLM 0.32 reads rank_pattern; others would scale all adapters as if of rank %d",
            trained.lora.rank,
        )
    if _parameters(trained):
        log.warning(_SERVING[experts])


def vllm_warning(rank: int) -> str | None:
    """A warning about serving this rank with vLLM, or None."""
    if rank in VLLM_RANKS:
        return None
    larger = [known for known in VLLM_RANKS if known > rank]
    if not larger:
        return f"adapters of rank {rank}: vLLM refuses ranks above {VLLM_RANKS[-1]}; serve the merged model"
    return f"adapters of rank {rank}: vLLM refuses --max-lora-rank {rank}; give it --max-lora-rank {larger[0]}"


def write_peft(trained: Trained, place: Place, experts: str) -> None:
    """Writes the adapter's two files to the staging folder, in float32 as trained; the configuration comes last.

    vLLM applies the rank and alpha of the whole adapter to every module, and silently ignores patterns. So experts'
    adapters are written for that scale: if their own differs, B is multiplied. Other modules keep their own scale
    (`lora.ranks`) and bit-identical values.
    """
    with place.create(WEIGHTS) as out:
        out.write(_header(trained, experts))
        for tensor in trained.tensors.values():
            for name, array in _tensors(trained, tensor, experts).items():
                if not np.isfinite(array).all():
                    raise UserError(f"{trained.state.folder}: {name} holds NaN or infinity: the training run diverged")
                out.write(array.astype("<f4", copy=False))
        place.finish(WEIGHTS, out)
    with place.create(CONFIG) as out:
        out.write((json.dumps(peft_config(trained, experts), indent=2) + "\n").encode())
        place.finish(CONFIG, out)
    ranks = sorted({how.rank for how in trained.layout.adapted.values()})
    adapted = sum(len(tensor.hf_names) for tensor in trained.adapted.values())
    log.info("PEFT adapter of rank %s on %d weights", ", ".join(map(str, ranks)), adapted)


def peft_config(trained: Trained, experts: str) -> dict[str, Any]:
    """`adapter_config.json`."""
    lora: LoraConfig = trained.lora
    rows, ranks = list(trained.token_rows), rank_pattern(trained, experts)
    scaled = {name: rank for name, rank in ranks.items() if _EXPERT.search(name)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": trained.base.folder,
        "r": lora.rank,
        "lora_alpha": _number(lora.alpha),
        "rank_pattern": ranks,
        "alpha_pattern": {name: _number(_scale(lora) * scaled_by(rank, lora.rslora)) for name, rank in scaled.items()},
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": target_modules(trained, experts),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # by full paths: PEFT matches every module with such an ending, including those of vision towers
        "modules_to_save": [name.removesuffix(".weight") for name in _whole(trained)] or None,
        **({"ensure_weight_tying": True} if HEAD in _whole(trained) else {}),
        **({"trainable_token_indices": {trained.match.embedding.removesuffix(".weight"): rows}} if rows else {}),
    }
    if parameters := _parameters(trained) if experts == "fused" else []:
        config |= {"target_parameters": parameters, "lora_dropout": 0.0}  # PEFT refuses parameters with dropout
    return config


def rank_pattern(trained: Trained, experts: str) -> dict[str, int]:
    """Ranks that differ from `lora.rank`, by module name; with the layer only where layers differ."""
    found: dict[str, dict[str, int]] = {}
    for tensor in trained.adapted.values():
        for name in _modules(tensor, experts):
            found.setdefault(_local(name), {})[name] = trained.layout.adapted[tensor.name].rank
    ranks: dict[str, int] = {}
    for local, of_layers in found.items():
        ranks |= of_layers if len(set(of_layers.values())) > 1 else {local: next(iter(of_layers.values()))}
    return {name: rank for name, rank in ranks.items() if rank != trained.lora.rank}


def target_modules(trained: Trained, experts: str) -> str | list[str]:
    """A regular expression that matches only the text model's adapted modules: a list would match vision towers too.

    PEFT accepts `layers_to_transform` only with a list, so the expression names the layers.
    """
    wrapped = set(_parameters(trained)) if experts == "fused" else set()
    names = [name for tensor in trained.adapted.values() for name in _modules(tensor, experts)]
    local = {_local(name) for name in names} - wrapped
    if not local:
        return []
    modules = "|".join(re.escape(name) for name in sorted(local))
    layers = r"\d+"
    if trained.lora.layers is not None:
        numbers = {int(name.split(".")[1]) for name in names}
        layers = f"({'|'.join(map(str, sorted(numbers)))})"
    tower = r".*language_model" if "language_model" in trained.prefix else r"(.*\.)?model"
    return rf"{tower}\.layers\.{layers}\.({modules})"


def _whole(trained: Trained) -> list[str]:
    """Names on disk of the weights trained in full."""
    return [name for t in trained.tensors.values() if trained.is_in_full(t) for name in _whole_names(trained, t)]


def _whole_names(trained: Trained, tensor: Tensor) -> list[str]:
    """A tensor's names; the embedding's include the output matrix, which PEFT, tied or not, would leave unchanged."""
    names = [full_name(trained.prefix, name) for name in tensor.hf_names]
    return [*names, HEAD] if trained.match.embedding in names else names


def _token_rows_name(trained: Trained) -> str:
    """PEFT's name for the individually trained rows of the embedding; it ties the output matrix to them."""
    return f"{PEFT_PREFIX}{trained.match.embedding.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"


def _tensors(trained: Trained, tensor: Tensor, experts: str) -> dict[str, np.ndarray]:
    if trained.is_in_full(tensor):
        pieces = list(tensor.to_hf(trained.state.read(tensor.name)).values())
        names = _whole_names(trained, tensor)
        pieces += pieces[:1] * (len(names) - len(pieces))
        return {PEFT_PREFIX + name: np.ascontiguousarray(x) for name, x in zip(names, pieces, strict=True)}
    if trained.rows_of(tensor):
        return {_token_rows_name(trained): trained.state.read(token_rows.NAME)}
    lora_a, lora_b, *magnitude = (trained.state.read(name) for name in trained.factor_names(tensor))
    factor = trained.layout.adapted[tensor.name].scale / _scale(trained.lora)
    if tensor.weight.each and factor != 1:
        lora_b = lora_b * np.float32(factor)
    return _named(trained, tensor, experts, lora_a, lora_b, *magnitude)


def _named(trained: Trained, tensor: Tensor, experts: str, *factors: np.ndarray) -> dict[str, np.ndarray]:
    """A, B and, with DoRA, magnitudes under their names in the file."""
    lora_a, lora_b, *magnitude = factors
    found = peft_tensors(tensor, lora_a, lora_b, trained.prefix, experts)
    for name, lengths in (tensor.magnitudes(*magnitude) if magnitude else {}).items():
        found[peft_magnitude_name(name, trained.prefix)] = lengths
    return found


def _parameters(trained: Trained) -> list[str]:
    """The adapted parameters of experts, as PEFT's `target_parameters` names them."""
    adapted = (tensor for tensor in trained.adapted.values() if tensor.weight.each)
    return list(dict.fromkeys(_local(name) for tensor in adapted for name in _modules(tensor, "fused")))


def _modules(tensor: Tensor, experts: str) -> list[str]:
    """PEFT's names for the weights of a tensor: `layers.5.self_attn.q_proj`."""
    names = list(tensor.hf_names)
    if tensor.weight.each and experts == "per_expert":
        names = [name for own in modules(names[0], tensor.hf_shape[0]) for name in own]
    return [name.removesuffix(".weight") for name in names]


def _local(module: str) -> str:
    """Its name in any layer: `self_attn.q_proj`."""
    return re.sub(r"^layers\.\d+\.", "", module)


def _scale(lora: LoraConfig) -> float:
    """The scale of B·A in a server that reads no patterns."""
    return lora.alpha / scaled_by(lora.rank, lora.rslora)


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def adapter_bytes(trained: Trained, experts: str) -> int:
    """Size of the weights' file."""
    return sum(4 * math.prod(shape) for _, shape in _shapes(trained, experts))


def _header(trained: Trained, experts: str) -> bytes:
    """The safetensors header; shapes are known before any value is read."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, shape in _shapes(trained, experts):
        start, stop = stop, stop + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _shapes(trained: Trained, experts: str) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor, in the order of writing."""
    for tensor in trained.tensors.values():
        if trained.is_in_full(tensor):
            yield from ((PEFT_PREFIX + name, list(tensor.hf_shape)) for name in _whole_names(trained, tensor))
            continue
        if rows := trained.rows_of(tensor):
            yield _token_rows_name(trained), [len(rows), tensor.hf_shape[1]]
            continue
        shapes = (trained.state.shape(name) for name in trained.factor_names(tensor))
        factors = (np.broadcast_to(np.float32(0), shape) for shape in shapes)
        for name, array in _named(trained, tensor, experts, *factors).items():
            yield name, list(array.shape)
