"""What a checkpoint's `config.json` says of its layers, in every form that transformers has written since 5.12.

Up to 5.14, heads of global layers are in `global_head_dim` and `num_global_key_value_heads`; from 5.15 on in
`per_layer_config`, a map from layer to what differs there. Both are read here, and both are written. No JAX here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma4_tpu.errors import UserError

SLIDING, GLOBAL = "sliding", "global"
LAYER_TYPES = {"sliding_attention": SLIDING, "full_attention": GLOBAL}
UNIFIED = ("gemma4_unified", "gemma4_unified_text")
"""`model_type` of 12B, which has no vision tower and no per-layer embeddings."""
MODEL_TYPES = ("gemma4", "gemma4_text", *UNIFIED)
UNQUANTISED = "use the original weights (lora.quantize=nf4 or int8 quantises them when they are loaded)"
"""What to do about a quantised checkpoint."""
_GLOBAL_HEAD_DIM = 512  # what transformers takes where neither key is there
_OVERRIDES = ("head_dim", "num_key_value_heads")
_WHOLE_NUMBERS = (
    "vocab_size", "vocab_size_per_layer_input", "hidden_size", "intermediate_size", "hidden_size_per_layer_input",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_global_key_value_heads", "head_dim",
    "global_head_dim", "sliding_window", "num_kv_shared_layers", "num_experts", "top_k_experts",
    "moe_intermediate_size", "max_position_embeddings",
)  # fmt: skip
_FLAGS = ("attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp", "tie_word_embeddings")


class ArchitectureError(UserError):
    """A `config.json` that does not describe a Gemma 4 model this project can train."""


@dataclass(frozen=True)
class Heads:
    """Attention heads of the layers of one type."""

    head_dim: int
    num_kv_heads: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings."""

    local_base: float = 10_000.0
    global_base: float = 1_000_000.0
    global_proportion: float = 0.25
    """Share of the head width that global layers rotate."""
    global_factor: float = 1.0
    """Divides the frequencies of global layers."""


@dataclass(frozen=True)
class Vision:
    """What a text model needs to know of a frozen vision tower whose features it reads."""

    dim: int
    """Width of the tower's output, one vector for each soft token."""
    image_token: int
    """The id that stands where a soft token goes."""
    pad_token: int
    """The id that both embedding tables are looked up with there."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a `config.json` that is about text: of a multimodal model `text_config`, else all of it."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ArchitectureError(f"config.json: text_config is {text!r}, not an object; copy the file again")
    return text


def need(text: Mapping[str, Any], key: str) -> Any:
    """A value that has no default; names the key where it is missing."""
    if text.get(key) is None:
        raise ArchitectureError(f"config.json: {key} is missing")
    return text[key]


def check_types(part: Mapping[str, Any], where: str = "") -> None:
    """Refuses values of another JSON type than transformers takes: in words and floats, nothing would notice them.

    Args:
      part: a `config.json`, or an object in it.
      where: what stands before its keys.
    """
    for keys, wanted, fits in ((_WHOLE_NUMBERS, "a whole number", _is_whole), (_FLAGS, "true or false", _is_flag)):
        for key in keys:
            if part.get(key) is not None and not fits(part[key]):
                raise ArchitectureError(f"config.json: {where}{key} is {part[key]!r}; give {wanted}, without quotes")


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def check_supported(text: Mapping[str, Any]) -> None:
    """Refuses another model family, and features of Gemma 4's config that have no counterpart here."""
    if text.get("model_type") not in MODEL_TYPES:
        raise ArchitectureError(
            f"config.json: model_type is {text.get('model_type')!r}; this project trains {', '.join(MODEL_TYPES)}"
        )
    for key, accepted in {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "rms_norm_eps": (1e-6,),
        "use_bidirectional_attention": (None, "vision"),
    }.items():
        if key in text and text[key] not in accepted:
            raise ArchitectureError(f"config.json: {key}={text[key]!r} is not supported; accepted: {accepted}")


def layer_types(text: Mapping[str, Any]) -> tuple[str, ...]:
    """`sliding` or `global` per layer; as in transformers, the last layer is always global."""
    num_layers, given = need(text, "num_hidden_layers"), text.get("layer_types")
    if given is None:
        types = pattern(num_layers)
    elif not isinstance(given, list):
        raise ArchitectureError(f"config.json: layer_types is {given!r}, not a list with one entry per layer")
    else:
        unknown = sorted({str(t) for t in given} - LAYER_TYPES.keys())
        if unknown or len(given) != num_layers:
            raise ArchitectureError(
                f"config.json: layer_types has {len(given)} entries (num_hidden_layers={num_layers})"
                + (f" and unknown kinds {unknown}" if unknown else "")
            )
        types = tuple(LAYER_TYPES[t] for t in given)
    return (*types[:-1], GLOBAL)


def pattern(num_layers: int, period: int = 6) -> tuple[str, ...]:
    """Layer types with a global layer at the end of each period."""
    return tuple(GLOBAL if (i + 1) % period == 0 else SLIDING for i in range(num_layers))


def heads(text: Mapping[str, Any]) -> dict[str, Heads]:
    """Heads of `sliding` and of `global` layers (a model without sliding layers has those of the others).

    Raises:
      ArchitectureError: an override in `per_layer_config` that has no counterpart here, or layers of one type that
        differ; names the layer and the key.
    """
    types = layer_types(text)
    own = {"head_dim": text.get("head_dim", 256), "num_key_value_heads": text.get("num_key_value_heads")}
    overrides = _overrides(text, types)
    found: dict[str, Heads] = {}
    for layer, kind in enumerate(types):
        layer_values = own | overrides.get(layer, {})
        these = Heads(*(need(layer_values, key) for key in _OVERRIDES))
        if found.setdefault(kind, these) != these:
            first = types.index(kind)
            raise ArchitectureError(
                f"config.json: per_layer_config gives layer {layer} other heads ({these}) than layer {first}"
                f" ({found[kind]}), which is {kind} too; layers of one type must be alike here"
            )
    return {SLIDING: found[GLOBAL]} | found


def _overrides(text: Mapping[str, Any], types: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Layer → its overrides: `per_layer_config` where that key is there, else what the older keys stand for."""
    if "per_layer_config" in text:
        return _read_overrides(text, text["per_layer_config"], len(types))
    override = {"head_dim": text.get("global_head_dim", _GLOBAL_HEAD_DIM) or text.get("head_dim", 256)}
    if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
        override["num_key_value_heads"] = text["num_global_key_value_heads"]
    return {layer: override for layer, kind in enumerate(types) if kind == GLOBAL}


def _read_overrides(text: Mapping[str, Any], given: Any, num_layers: int) -> dict[int, dict[str, Any]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(entry, Mapping) for entry in given.values()):
        raise ArchitectureError(f"config.json: per_layer_config is {given!r:.100}, not a map from layer to overrides")
    found: dict[int, dict[str, Any]] = {}
    for key, entry in given.items():
        if not str(key).isdecimal() or int(key) >= num_layers:
            raise ArchitectureError(
                f"config.json: per_layer_config names layer {key!r}; there are 0 to {num_layers - 1}"
            )
        if int(key) in found:
            raise ArchitectureError(f"config.json: per_layer_config names layer {int(key)} twice")
        check_types(entry, f"per_layer_config.{key}.")
        for name, value in entry.items():
            nothing = [] if name == "skip" else text.get(name)
            if name not in _OVERRIDES and value != nothing:
                raise ArchitectureError(
                    f"config.json: per_layer_config.{key}.{name}={value!r}: layers that differ in {name} have no"
                    f" counterpart here; only {' and '.join(_OVERRIDES)} may"
                )
        found[int(key)] = {name: value for name, value in entry.items() if name in _OVERRIDES}
    return found


def rope(text: Mapping[str, Any]) -> Rope:
    """Rotary position embeddings; as in transformers, what is given must be complete.

    Raises:
      ArchitectureError: another type, a missing key, one set of values for all layers (`{"rope_theta": …}`), or
        `rope_scaling`, which Gemma 4 does not have.
    """
    if text.get("rope_scaling") is not None:
        raise ArchitectureError(
            f"config.json: rope_scaling={text['rope_scaling']!r} is not a key of Gemma 4; write it as rope_parameters"
            " of sliding_attention and full_attention"
        )
    given = text.get("rope_parameters")
    if given is None:
        return Rope()
    wanted = {
        "sliding_attention": ("default", ("rope_theta",)),
        "full_attention": ("proportional", ("rope_theta", "partial_rotary_factor")),
    }
    for layers, (kind, keys) in wanted.items():
        if not isinstance(given, Mapping) or not isinstance(given.get(layers), Mapping):
            raise ArchitectureError(
                f"config.json: rope_parameters={given!r} has no {layers}; Gemma 4 has values for each of"
                f" {' and '.join(wanted)} (a flat form of one model family does not say which layers it means)"
            )
        if (found := given[layers].get("rope_type")) != kind:
            raise ArchitectureError(f"config.json: rope_parameters.{layers}.rope_type is {found!r}, not {kind!r}")
        for key in keys:
            if not isinstance(given[layers].get(key), int | float):
                raise ArchitectureError(
                    f"config.json: rope_parameters.{layers}.{key} is {given[layers].get(key)!r}; give a number"
                )
    local, wide = given["sliding_attention"], given["full_attention"]
    factor = wide.get("factor", 1.0)
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ArchitectureError(f"config.json: rope_parameters.full_attention.factor is {factor!r}; give more than 0")
    return Rope(
        float(local["rope_theta"]), float(wide["rope_theta"]), float(wide["partial_rotary_factor"]), float(factor)
    )


BLOCKWISE = (
    "pictures are read by E2B and E4B alone so far: in 12B, 26B-A4B and 31B the tokens of one picture also see each"
    " other on sliding layers (use_bidirectional_attention=vision), a mask that is not here; leave out data.image_cache"
)
"""Why the larger sizes are trained on text alone."""


def vision(config: Mapping[str, Any]) -> Vision:
    """What a checkpoint's `config.json` says of its vision tower.

    Raises:
      ArchitectureError: there is none, or the model attends to pictures in a way that has no counterpart here.
    """
    text, tower = text_config(config), config.get("vision_config")
    if text.get("model_type") in UNIFIED or text.get("use_bidirectional_attention") == "vision":
        raise ArchitectureError(f"config.json: {BLOCKWISE}")
    if not isinstance(tower, Mapping):
        raise ArchitectureError(
            "config.json: no vision_config: a text-only checkpoint, which reads no pictures; give one saved as"
            " Gemma4ForConditionalGeneration, or leave out data.image_cache"
        )
    found = {
        "vision_config.hidden_size": tower.get("hidden_size", 768),
        "image_token_id": config.get("image_token_id", 258_880),
        "text_config.pad_token_id": text.get("pad_token_id", 0),
    }
    for key, value in found.items():
        if not _is_whole(value):
            raise ArchitectureError(f"config.json: {key} is {value!r}; give a whole number, without quotes")
    if tower.get("rms_norm_eps", 1e-6) != 1e-6:
        raise ArchitectureError(
            f"config.json: vision_config.rms_norm_eps={tower['rms_norm_eps']!r} is not supported; accepted: 1e-06"
        )
    return Vision(*found.values())


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The method by which a checkpoint's `config.json` says that it is quantised; None: it does not."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and (given := part.get("quantization_config")):
            named = given if isinstance(given, Mapping) else {}
            return str(named.get("quant_method") or named.get("quant_algo") or "a method that it does not name")
    return None


def with_both_key_sets(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model's `config.json` with the heads of global layers in the older keys and in the newer one.

    transformers before 5.15 reads the former and refuses the weights without them; later versions prefer the latter.
    `head_dim` and `num_key_value_heads` become those of sliding layers.
    """
    text = text_config(config)
    kinds, types = heads(text), layer_types(text)
    local, wide = kinds[SLIDING], kinds[GLOBAL]
    differing = {
        key: value
        for key, value, own in zip(
            _OVERRIDES, (wide.head_dim, wide.num_kv_heads), (local.head_dim, local.num_kv_heads), strict=True
        )
        if value != own
    }
    layers = [layer for layer, kind in enumerate(types) if kind == GLOBAL] if differing else []
    digits = len(str(max(layers, default=0)))  # as transformers writes them, so that keys sort by layer
    values = {
        "head_dim": local.head_dim,
        "num_key_value_heads": local.num_kv_heads,
        "global_head_dim": wide.head_dim,
        "num_global_key_value_heads": wide.num_kv_heads if text.get("attention_k_eq_v") else None,
        "per_layer_config": {f"{layer:0{digits}}": dict(differing) for layer in layers},
    }
    written = {**text, **values}
    return {**config, "text_config": written} if "text_config" in config else written
