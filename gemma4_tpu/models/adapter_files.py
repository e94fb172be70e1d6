"""Reads adapters in PEFT's format, as saved by `peft`, TRL and Unsloth: safetensors only; nothing is unpickled.

Reads what `export/peft.py` writes, and what other tools write. Imports no JAX.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gemma4_tpu.errors import UserError
from gemma4_tpu.models.expert_files import by_parameter, from_experts, from_fused, parameter_of
from gemma4_tpu.models.names import HEAD, MAGNITUDE, from_peft_module, from_peft_name, some
from gemma4_tpu.models.tensorfile import TensorFile
from gemma4_tpu.models.weights import BY_NAME, EMBEDDING
from gemma4_tpu.storage import join, list_folder, open_bytes, read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DTYPES = ("float32", "bfloat16", "float16")
_NAME = re.compile(r"\^?[\w.]+")  # module names: PEFT also accepts regular expressions, which can hang
_HASHED_AT_ONCE_BYTES = 32 << 20

_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Keys of PEFT's configuration that do not affect what a saved adapter computes, besides those that are read. Every
other key must be off, including keys that later versions of PEFT add.
"""
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "modules_to_save", "target_parameters", "use_dora",
}  # fmt: skip
_OFF: tuple[Any, ...] = (None, False, "none", [], {})
MERGE_FIRST = "merge it into its base first (with peft: merge_and_unload) and give model.path=<merged folder>"
"""What works for adapters that this project cannot represent."""
_ON_THE_SAME_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights unchanged."""


@dataclass(frozen=True)
class Given:
    """The trained adapter of one weight `[out, in]`, with delta scale · B @ A. For experts, all dims come after
    theirs.
    """

    a_shape: tuple[int, ...]
    """`[r, in]`"""
    b_shape: tuple[int, ...]
    """`[out, r]`"""
    scale: float
    read: Callable[[], tuple[np.ndarray, np.ndarray]]
    """(A, B) in float32."""
    magnitude: Callable[[], np.ndarray] | None = None
    """DoRA's, `[out]` in float32."""

    @property
    def adds_nothing(self) -> bool:
        """Whether the weight equals the base's."""
        return self.magnitude is None and not self.read()[1].any()

    @property
    def rank(self) -> int:
        return self.a_shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return *self.a_shape[:-2], self.b_shape[-2], self.a_shape[-1]


@dataclass(frozen=True)
class Whole:
    """A weight that was trained in full."""

    shape: tuple[int, ...]
    """Shape on disk."""
    read: Callable[[], np.ndarray]
    """Its values in float32, with the dims on disk."""


@dataclass(frozen=True)
class PeftAdapter:
    """The two files of an adapter, checked as far as headers allow."""

    weights: Mapping[str, Given]
    """By the weight's name without prefix: `layers.3.self_attn.q_proj.weight`."""
    whole: Mapping[str, Whole]
    """Modules that were saved whole (`modules_to_save`), by the same names."""
    base: str | None
    """The base model that it says it was trained on."""
    sha256: str
    """Of both files."""


def read_peft(folder: str) -> PeftAdapter:
    """Opens the adapter in `folder`, local or remote.

    Raises:
      UserError: not plain LoRA, pickled or damaged files, or a tensor that belongs to no adapter.
    """
    present = list_folder(folder)
    if WEIGHTS not in present:
        pickled = [name for name in present if name.endswith((".bin", ".pt", ".pth"))]
        if pickled:
            raise UserError(
                f"{join(folder, pickled[0])}: pickled, and pickles are not read; load the adapter with peft and save it"
                " again (as safetensors, its default)"
            )
        raise UserError(f"{folder}: has no {WEIGHTS}; found {', '.join(present[:10])}")
    config, file = read_json(join(folder, CONFIG)), TensorFile(join(folder, WEIGHTS))
    _check_config(config, join(folder, CONFIG))
    pairs, modules, others = _pairs(file)
    _check_magnitudes(file, pairs, bool(config.get("use_dora")))
    whole = _whole(file, others, config.get("modules_to_save"))
    weights = _experts(file, config, pairs, modules)
    if weights and config.get("use_dora"):
        raise UserError(f"{file.path}: use_dora for experts ({some(list(weights))}), whose adapters have no magnitudes")
    weights |= {weight: _given(file, pair, _scale(config, modules[weight])) for weight, pair in pairs.items()}
    return PeftAdapter(weights, whole, config.get("base_model_name_or_path"), _sha256(folder))


def _check_config(config: Mapping[str, Any], where: str) -> None:
    if str(config.get("peft_type")).upper() != "LORA":
        raise UserError(f"{where}: peft_type={config.get('peft_type')}: only LORA adapters can be used")
    problems = [
        f"{key}={config[key]}: contains regular expressions, but only module names are read; write those that it"
        " matches"
        for key in ("rank_pattern", "alpha_pattern")
        if not (isinstance(found := config.get(key) or {}, dict) and all(_NAME.fullmatch(name) for name in found))
    ]
    more = [
        f"{key}={value}" for key, value in config.items() if key not in _READ | _WITHOUT_EFFECT and value not in _OFF
    ]
    if more:
        problems.append(f"{', '.join(more)}: changes more than plain LoRA does; {MERGE_FIRST}")
    if (initial := config.get("init_lora_weights", True)) not in _ON_THE_SAME_BASE:
        problems.append(
            f"init_lora_weights={initial}: changed the base weights too; convert it with peft:"
            " save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def _pairs(file: TensorFile) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Weight → (`A`, `B`, with DoRA `magnitude_vector`) → tensor name; weight → the module's path as spelt; tensors
    that are not factors.
    """
    pairs: dict[str, dict[str, str]] = {}
    modules: dict[str, str] = {}
    others = []
    for name in file.tensors:
        if (found := from_peft_name(name)) is None:
            others.append(name)
            continue
        weight, factor, modules[weight] = found[0], found[1], found[2]
        if (other := pairs.setdefault(weight, {}).setdefault(factor, name)) != name:
            raise UserError(f"{file.path}: {other} and {name} are two adapters of one weight; save only one of them")
    if half := [name for pair in pairs.values() for name in pair.values() if not {"A", "B"} <= pair.keys()]:
        raise UserError(f"{file.path}: {some(half)}: A without B, or B without A; save the adapter again")
    if not pairs:
        raise UserError(f"{file.path}: contains no adapter")
    return pairs, modules, others


def _check_magnitudes(file: TensorFile, pairs: Mapping[str, Mapping[str, str]], dora: bool) -> None:
    """Raises `UserError` if only some weights have DoRA magnitudes, or if they contradict the configuration."""
    if other := [weight for weight, pair in pairs.items() if (MAGNITUDE in pair) != dora]:
        has = "no magnitudes" if dora else "magnitudes"
        raise UserError(
            f"{file.path}: {some(other)}: {has}, but {CONFIG} says use_dora={str(dora).lower()}; these files don't"
            " belong together"
        )


def _whole(file: TensorFile, names: list[str], modules_to_save: list[str] | None) -> dict[str, Whole]:
    """The tensors that are not factors of adapters, provided that PEFT's configuration announces them."""
    found: dict[str, Whole] = {}
    for name in names:
        info = file.tensors[name]
        if not modules_to_save or info.dtype.name not in _DTYPES or (weight := from_peft_module(name)) in found:
            raise UserError(
                f"{file.path}: {name}: neither the A or B of a LoRA adapter nor a weight of a module in {CONFIG}'s"
                f" modules_to_save={modules_to_save}; nothing here could take it"
            )
        found[weight] = Whole(info.shape, partial(_read, file, name))
    head, embedding = found.get(HEAD), found.get(BY_NAME[EMBEDDING].on_disk)
    if (head or embedding) and not (head and embedding and np.array_equal(head.read(), embedding.read())):
        raise UserError(
            f"{file.path}: embedding and output matrix differ, but Gemma 4 ties them; train them as one"
            " (ensure_weight_tying=True)"
        )
    if absent := [m for m in modules_to_save or () if not any(n.removesuffix(".weight").endswith(m) for n in names)]:
        raise UserError(f"{file.path}: {CONFIG} says modules_to_save={absent}, but there is no tensor of it")
    return {name: one for name, one in found.items() if name != HEAD}


def _given(file: TensorFile, pair: Mapping[str, str], scale: tuple[float, int]) -> Given:
    a, b = (_matrix(file, pair[factor]) for factor in "AB")
    factor, rank = scale
    if not a[0] == b[1] == rank:
        raise _apart(file, pair, a, b, rank)
    magnitude = pair.get(MAGNITUDE)
    if magnitude and file.tensors[magnitude].shape != b[:1]:
        raise UserError(f"{file.path}: {magnitude} has shape {list(file.tensors[magnitude].shape)}, not [{b[0]}]")
    lengths = partial(_read, file, magnitude) if magnitude else None
    return Given(a, b, factor, lambda: (_read(file, pair["A"]), _read(file, pair["B"])), lengths)


def _matrix(file: TensorFile, name: str) -> tuple[int, ...]:
    """The shape of a tensor, which must be a matrix of floats."""
    info = file.tensors[name]
    if info.dtype.name not in _DTYPES or len(info.shape) != 2:
        raise UserError(f"{file.path}: {name} is {info.dtype.name}{list(info.shape)}, not a matrix of floats")
    return info.shape


def _apart(file: TensorFile, pair: Mapping[str, str], a: tuple[int, ...], b: tuple[int, ...], rank: int) -> UserError:
    return UserError(
        f"{file.path}: {pair['A']} has shape {list(a)}, {pair['B']} {list(b)}, but {CONFIG} says rank {rank}; these"
        " files don't belong together"
    )


def _experts(
    file: TensorFile, config: Mapping[str, Any], pairs: dict[str, dict[str, str]], names: Mapping[str, str]
) -> dict[str, Given]:
    """The adapters of experts in both formats of `expert_files.py`; removes them from `pairs`."""
    found = {}
    for weight in list(pairs):
        if own := parameter_of(names[weight], config.get("target_parameters") or []):
            in_base, here = (
                name.removesuffix(".base_layer") for name in (names[weight], weight.removesuffix(".weight"))
            )
            found[f"{here}.{own}"] = _fused(file, pairs.pop(weight), _scale(config, f"{in_base}.{own}"))
    try:
        grouped = by_parameter([weight.removesuffix(".weight") for weight in pairs])
    except ValueError as missing:
        raise UserError(
            f"{file.path}: no adapter for {missing}, although other experts have one; save all of them"
        ) from None
    for parameter, matrices in grouped.items():
        parts = [[pairs.pop(f"{module}.weight") for module in row] for row in matrices]
        if parameter in found:
            raise UserError(
                f"{file.path}: {parameter} has an adapter for all experts and one for each; save one of them"
            )
        scales = {_scale(config, names[f"{module}.weight"]) for row in matrices for module in row}
        if len(scales) > 1:
            raise UserError(f"{file.path}: {parameter}: its experts have several ranks or scales: {sorted(scales)}")
        found[parameter] = _per_expert(file, parts, *scales)
    return found


def _fused(file: TensorFile, pair: Mapping[str, str], scale: tuple[float, int]) -> Given:
    factor, rank = scale
    a, b = (_matrix(file, pair[name]) for name in "AB")
    experts = a[0] // rank
    if not a[0] == b[1] == experts * rank:
        raise _apart(file, pair, a, b, rank)

    def read() -> tuple[np.ndarray, np.ndarray]:
        return from_fused(_read(file, pair["A"]), _read(file, pair["B"]), rank)

    return Given((experts, rank, a[1]), (experts, b[0], rank), factor, read)


def _per_expert(file: TensorFile, parts: list[list[dict[str, str]]], scale: tuple[float, int]) -> Given:
    factor, rank = scale
    for row in parts:
        shapes = [(_matrix(file, pair["A"]), _matrix(file, pair["B"])) for pair in row]
        for pair, (a, b) in zip(row, shapes, strict=True):
            if not a[0] == b[1] == rank or (a, b) != shapes[0]:
                raise _apart(file, pair, a, b, rank)

    def read() -> tuple[np.ndarray, np.ndarray]:
        return from_experts([[(_read(file, pair["A"]), _read(file, pair["B"])) for pair in row] for row in parts])

    for pair, *others in zip(*parts, strict=True):  # of one expert
        if not all(np.array_equal(_read(file, pair["A"]), _read(file, other["A"])) for other in others):
            rank *= len(parts)
            break
    (_, in_size), outs = _matrix(file, parts[0][0]["A"]), [_matrix(file, row[0]["B"])[0] for row in parts]
    return Given((len(parts[0]), rank, in_size), (len(parts[0]), sum(outs), rank), factor, read)


def _read(file: TensorFile, name: str) -> np.ndarray:
    return file.read(name).astype(np.float32)


def _scale(config: Mapping[str, Any], module: str) -> tuple[float, int]:
    """(factor of B·A, rank) of a module, as PEFT determines them."""
    rank = _of_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and 0 < alpha < math.inf):
        raise UserError(f"{CONFIG}: r={rank}, lora_alpha={alpha} for {module}: must be numbers more than 0")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that the module's path ends with (or equals, with `^`)."""
    for name, value in (patterns or {}).items():
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}")):
            return value
    return otherwise


def _sha256(folder: str) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        file = open_bytes(join(folder, name))
        for start in range(0, file.size_bytes, _HASHED_AT_ONCE_BYTES):
            digest.update(file.read(start, min(start + _HASHED_AT_ONCE_BYTES, file.size_bytes)))
    return digest.hexdigest()
