"""Architectures of Gemma 4: the numbers that determine every shape, for the released sizes and for any `config.json`.

Imports no JAX: configuration checks and sweeps read these numbers without starting an accelerator runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from gemma4_tpu import hf_config
from gemma4_tpu.hf_config import GLOBAL, LAYER_TYPES, SLIDING, UNIFIED, ArchitectureError, Vision, need, pattern


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes and constants of one Gemma 4 text model. Names follow Tunix's `ModelConfig` where it has one."""

    name: str
    num_layers: int
    vocab_size: int = 262_144
    embed_dim: int
    hidden_dim: int
    """Width of the dense MLP."""
    num_heads: int
    head_dim: int = 256
    """Head width of sliding layers."""
    num_kv_heads: int
    """Key/value heads of sliding layers."""
    global_head_dim: int = 512
    num_global_kv_heads: int
    sliding_window: int
    """Tokens a sliding layer sees, itself included."""
    layer_types: tuple[str, ...]
    """`sliding` or `global`, one per layer."""
    k_eq_v: bool = False
    """Global layers also use their key projection as value projection."""
    local_rope_base: float = 10_000.0
    global_rope_base: float = 1_000_000.0
    global_rope_proportion: float = 0.25
    global_rope_factor: float = 1.0
    """Divides the frequencies of global layers."""
    final_logit_softcap: float | None = 30.0
    per_layer_input_dim: int = 0
    """Width of per-layer embeddings (E2B, E4B); 0: none."""
    vocab_size_per_layer_input: int = 262_144
    num_kv_shared_layers: int = 0
    """The last N layers read keys and values of the last unshared layer of their type."""
    kv_shared_hidden_dim: int | None = None
    """MLP width of KV-shared layers if it differs (E2B doubles it)."""
    num_experts: int = 0
    """Experts per layer (26B-A4B); 0: dense."""
    experts_per_token: int = 0
    expert_dim: int = 0
    max_positions: int | None = field(default=None, compare=False, repr=False)
    """Longest sequence that its checkpoint names (`max_position_embeddings`), in tokens; None: not known."""
    vision: Vision | None = field(default=None, repr=False)
    """Set if pictures are read (`data.image_cache`); None: text only, and the projector is left untouched."""

    @property
    def num_unshared_layers(self) -> int:
        return self.num_layers - self.num_kv_shared_layers

    def is_global(self, layer: int) -> bool:
        """Whether a layer attends to everything before it."""
        return self.layer_types[layer] == GLOBAL

    def is_kv_shared(self, layer: int) -> bool:
        """Whether a layer uses the keys and values of an earlier one."""
        return layer >= self.num_unshared_layers

    def kv_origin(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to (itself unless KV-shared)."""
        if not self.is_kv_shared(layer):
            return layer
        return max(i for i in range(self.num_unshared_layers) if self.layer_types[i] == self.layer_types[layer])

    def layer_head_dim(self, layer: int) -> int:
        """Width of a layer's heads."""
        return self.global_head_dim if self.is_global(layer) else self.head_dim

    def layer_kv_heads(self, layer: int) -> int:
        """KV heads of a layer."""
        return self.num_global_kv_heads if self.is_global(layer) else self.num_kv_heads

    def layer_hidden_dim(self, layer: int) -> int:
        """Hidden units of a layer's (dense) MLP."""
        if self.is_kv_shared(layer) and self.kv_shared_hidden_dim:
            return self.kv_shared_hidden_dim
        return self.hidden_dim

    def legal_tp(self, devices: int) -> list[int]:
        """Sizes of the `tp` axis that divide `devices`, the query heads and every number of KV heads above one."""
        heads = [self.num_heads] + [n for n in (self.num_kv_heads, self.num_global_kv_heads) if n > 1]
        return [tp for tp in range(1, devices + 1) if devices % tp == 0 and all(h % tp == 0 for h in heads)]


# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in [
        Architecture(
            name="gemma4_31b", num_layers=60, embed_dim=5376, hidden_dim=21504, num_heads=32, num_kv_heads=16,
            num_global_kv_heads=4, sliding_window=1024, layer_types=pattern(60), k_eq_v=True,
        ),
        Architecture(
            name="gemma4_12b", num_layers=48, embed_dim=3840, hidden_dim=15360, num_heads=16, num_kv_heads=8,
            num_global_kv_heads=1, sliding_window=1024, layer_types=pattern(48), k_eq_v=True,
        ),
        Architecture(
            name="gemma4_26b_a4b", num_layers=30, embed_dim=2816, hidden_dim=2112, num_heads=16, num_kv_heads=8,
            num_global_kv_heads=2, sliding_window=1024, layer_types=pattern(30), k_eq_v=True,
            num_experts=128, experts_per_token=8, expert_dim=704,
        ),
        Architecture(
            name="gemma4_e4b", num_layers=42, embed_dim=2560, hidden_dim=10240, num_heads=8, num_kv_heads=2,
            num_global_kv_heads=2, sliding_window=512, layer_types=pattern(42), per_layer_input_dim=256,
            num_kv_shared_layers=18,
        ),
        Architecture(
            name="gemma4_e2b", num_layers=35, embed_dim=1536, hidden_dim=6144, num_heads=8, num_kv_heads=1,
            num_global_kv_heads=1, sliding_window=512, layer_types=pattern(35, 5), per_layer_input_dim=256,
            num_kv_shared_layers=20, kv_shared_hidden_dim=12288,
        ),
        # Small models for laptops and tests. `tiny` is 31B in miniature and has a trained base checkpoint.
        Architecture(
            name="tiny", num_layers=6, vocab_size=512, embed_dim=128, hidden_dim=384, num_heads=8, head_dim=16,
            num_kv_heads=4, global_head_dim=32, num_global_kv_heads=1, sliding_window=128, layer_types=pattern(6),
            k_eq_v=True,
        ),
        Architecture(
            name="tiny_moe", num_layers=6, vocab_size=512, embed_dim=64, hidden_dim=96, num_heads=4, head_dim=16,
            num_kv_heads=4, global_head_dim=32, num_global_kv_heads=2, sliding_window=64, layer_types=pattern(6),
            k_eq_v=True, num_experts=8, experts_per_token=2, expert_dim=32,
        ),
        Architecture(
            name="tiny_e2b", num_layers=10, vocab_size=512, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16,
            num_kv_heads=1, global_head_dim=32, num_global_kv_heads=1, sliding_window=64, layer_types=pattern(10, 5),
            per_layer_input_dim=16, vocab_size_per_layer_input=512, num_kv_shared_layers=5, kv_shared_hidden_dim=256,
        ),
    ]
}
# fmt: on


def from_hf_config(config: dict[str, Any], *, name: str = "checkpoint") -> Architecture:
    """The architecture that a checkpoint's `config.json` describes (multimodal or text-only).

    Defaults are those of transformers' `Gemma4TextConfig` (5.12 to 5.24).

    Raises:
      ArchitectureError: it is not a Gemma 4 config, or uses an unsupported feature; names the key.
    """
    text = hf_config.text_config(config)
    hf_config.check_supported(text)
    for part in (config, text):
        hf_config.check_types(part)
    layer_types = hf_config.layer_types(text)
    heads, rope = hf_config.heads(text), hf_config.rope(text)
    shared = text.get("num_kv_shared_layers") or 0
    hidden = need(text, "intermediate_size")
    moe = bool(text.get("enable_moe_block", False))
    per_layer_input = text.get("hidden_size_per_layer_input", 0 if text["model_type"] in UNIFIED else 256) or 0
    arch = Architecture(
        name=name,
        num_layers=len(layer_types),
        vocab_size=text.get("vocab_size", 262_144),
        embed_dim=need(text, "hidden_size"),
        hidden_dim=hidden,
        num_heads=need(text, "num_attention_heads"),
        head_dim=heads[SLIDING].head_dim,
        num_kv_heads=heads[SLIDING].num_kv_heads,
        global_head_dim=heads[GLOBAL].head_dim,
        num_global_kv_heads=heads[GLOBAL].num_kv_heads,
        sliding_window=need(text, "sliding_window"),
        layer_types=layer_types,
        k_eq_v=bool(text.get("attention_k_eq_v", False)),
        local_rope_base=rope.local_base,
        global_rope_base=rope.global_base,
        global_rope_proportion=rope.global_proportion,
        global_rope_factor=rope.global_factor,
        final_logit_softcap=text.get("final_logit_softcapping"),
        per_layer_input_dim=per_layer_input,
        vocab_size_per_layer_input=(per_layer_input and text.get("vocab_size_per_layer_input")) or 262_144,
        num_kv_shared_layers=shared,
        kv_shared_hidden_dim=2 * hidden if shared and text.get("use_double_wide_mlp") else None,
        num_experts=need(text, "num_experts") if moe else 0,
        experts_per_token=need(text, "top_k_experts") if moe else 0,
        expert_dim=need(text, "moe_intermediate_size") if moe else 0,
        max_positions=text.get("max_position_embeddings"),
    )
    for i in range(arch.num_unshared_layers, arch.num_layers):
        if arch.layer_types[i] not in arch.layer_types[: arch.num_unshared_layers]:
            raise ArchitectureError(f"config.json: KV-shared layer {i} has no earlier {arch.layer_types[i]} layer")
    return arch


def seeing(arch: Architecture, config: dict[str, Any] | None) -> Architecture:
    """The architecture with its vision settings.

    Args:
      arch: a text model.
      config: its checkpoint's `config.json`; None: not readable yet, so assume the released size's.

    Raises:
      ArchitectureError: the checkpoint has no vision tower, or attends to pictures in an unsupported way.
    """
    if config is not None:
        return replace(arch, vision=hf_config.vision(config))
    if not arch.per_layer_input_dim:
        raise ArchitectureError(f"{arch.name}: {hf_config.BLOCKWISE}")
    return replace(arch, vision=Vision(dim=768, image_token=258_880, pad_token=0))


def to_hf_config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of a text-only checkpoint of `arch` (inverse of `from_hf_config`)."""
    names = {v: k for k, v in LAYER_TYPES.items()}
    moe = arch.num_experts > 0
    wide = {"rope_theta": arch.global_rope_base, "partial_rotary_factor": arch.global_rope_proportion}
    config = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.embed_dim,
        "intermediate_size": arch.hidden_dim,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "head_dim": arch.head_dim,
        "num_key_value_heads": arch.num_kv_heads,
        "per_layer_config": {
            str(i): {"head_dim": arch.layer_head_dim(i), "num_key_value_heads": arch.layer_kv_heads(i)}
            for i in range(arch.num_layers)
        },
        "sliding_window": arch.sliding_window,
        "layer_types": [names[t] for t in arch.layer_types],
        "attention_k_eq_v": arch.k_eq_v,
        "final_logit_softcapping": arch.final_logit_softcap,
        "hidden_size_per_layer_input": arch.per_layer_input_dim,
        "vocab_size_per_layer_input": arch.vocab_size_per_layer_input,
        "num_kv_shared_layers": arch.num_kv_shared_layers,
        "use_double_wide_mlp": arch.kv_shared_hidden_dim is not None,
        "enable_moe_block": moe,
        "num_experts": arch.num_experts if moe else None,
        "top_k_experts": arch.experts_per_token if moe else None,
        "moe_intermediate_size": arch.expert_dim if moe else None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": arch.local_rope_base},
            "full_attention": {"rope_type": "proportional"}
            | wide
            | ({"factor": arch.global_rope_factor} if arch.global_rope_factor != 1 else {}),
        },
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": arch.max_positions or 131_072,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    return hf_config.with_both_key_sets(config)


def _shown(value: Any) -> str:
    """A field's value; for layer types, the global layers."""
    if isinstance(value, tuple):
        return f"global layers {', '.join(str(i) for i, kind in enumerate(value) if kind == GLOBAL)}"
    return repr(value)


_NOT_OF_THE_SIZE = ("name", "global_rope_factor", "max_positions", "vision")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")


def contradictions(expected: Architecture, found: Architecture) -> list[str]:
    """Fields in which a checkpoint's architecture differs from the configured one, as `field: expected … found …`.

    Positions and a RoPE factor for longer texts, or rows added to the vocabulary, do not make it another size.
    """
    return [
        f"{key}: model={expected.name} has {_shown(value)}, the checkpoint {_shown(getattr(found, key))}"
        for key, value in replace(expected, name="").__dict__.items()
        if key not in _NOT_OF_THE_SIZE and not _same(value, getattr(found, key))
        and not (key in _VOCABULARIES and getattr(found, key) > value)
    ]  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b)
    return a == b
