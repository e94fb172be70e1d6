"""The weights of Gemma 4, one row each; everything else that the package knows about a weight follows from its row.

A row says what a weight is called in memory (as in Tunix) and on disk (as in Hugging Face), and a pattern such as `(n
h) d -> n d h` gives its dims: on the left on disk, on the right in memory. A letter is a dim:

    v vocabulary   d model   n query heads   k KV heads   h head width   f hidden units   l layers
    e experts   x hidden units of an expert   c keys and values, or gate and up   s a single number
    p width of a per-layer embedding   u, w rows and columns of the table of all of them
    i features of a picture

Three letters are not dims of weights: b and t, rows and tokens of an activation; r, the rank of an adapter.

Hugging Face's products are `[out, in]`, those of experts `[expert, out, in]`. So the pattern also says which dims a
product contracts, hence its equation and the shapes of its adapter; and each letter has its mesh axis. Imports no JAX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from gemma4_tpu.architectures import Architecture

FSDP, TP = "fsdp", "tp"
Axes = str | tuple[str, ...] | None
"""Mesh axes that split a dim; None: it is not split."""
AXES: dict[str, Axes] = {"v": TP, "u": TP, "n": TP, "k": TP, "f": TP, "d": FSDP, "w": FSDP, "x": (FSDP, TP)}
"""Mesh axes of each dim that is split."""

EMBEDDING = "embedder.input_embedding"
"""The table that doubles as the output matrix."""
PER_LAYER_TABLE = "embedder.per_layer_input_embedding"
"""A lookup table, never a factor of a product. Tunix has it as [V, L, P]; stored in whole rows, a TPU neither pads it
nor copies it for the lookup.
"""

PROJECTOR = "embedder.mm_input_projection.w"
"""Maps a picture's features to embeddings."""
BESIDE_TEXT = "embed_vision."
"""Prefix on disk of what is next to the text model, not inside it."""


def _always(arch: Architecture, layer: int) -> bool:
    return True


def _own_kv(arch: Architecture, layer: int) -> bool:
    return not arch.is_kv_shared(layer)


def _one_for_k_and_v(arch: Architecture, layer: int) -> bool:
    return _own_kv(arch, layer) and arch.is_global(layer) and arch.k_eq_v


def _k_and_v(arch: Architecture, layer: int) -> bool:
    return _own_kv(arch, layer) and not _one_for_k_and_v(arch, layer)


def _experts(arch: Architecture, layer: int) -> bool:
    return arch.num_experts > 0


def _per_layer(arch: Architecture, layer: int) -> bool:
    return arch.per_layer_input_dim > 0


def _pictures(arch: Architecture, layer: int) -> bool:
    return arch.vision is not None


@dataclass(frozen=True, eq=False)
class Weight:
    """A row of the table."""

    name: str
    """Name in memory, without `layers.N.`."""
    pattern: str
    """Dims on disk → dims in memory. Brackets group letters into one dim on disk. c exists only in memory and counts
    the names in `on_disk`.
    """
    on_disk: str
    """Name on disk, without `layers.N.`; if stored in several pieces, their names."""
    role: str | None = None
    """The name in `lora.targets` that gives it an adapter; None: it never gets one."""
    fold: int = -1
    """Folded into a layer's dropout key for its adapter. Each weight has its own number, which must never change:
    resumed runs would draw other masks. -1: its adapter has no dropout (experts, as in PEFT).
    """
    only: Callable[[Architecture, int], bool] = _always
    """Which layers (or, outside the layers, which models) have it."""
    axes: Mapping[str, Axes] = field(default_factory=dict)
    """Exceptions from `AXES`."""
    adapter_axes: Mapping[str, Axes] = field(default_factory=dict)
    """Exceptions from both for its adapter, which can be split where the weight must not be."""

    @property
    def path(self) -> tuple[str, ...]:
        """Its name, as keys of nested dicts."""
        return tuple(self.name.split("."))

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Its name on disk, or the names of its pieces."""
        return tuple(self.on_disk.split())

    @property
    def modules(self) -> tuple[str | None, ...]:
        """Names of its single pieces in `lora.targets`: `k`, `v`; None: only the role names it."""
        found = [re.search(r"(\w+)_proj\.weight$", name) for name in self.hf_names]
        return tuple(name[1] if name and self.role else None for name in found)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The dims on disk, each with the letters that it combines: `("nh", "d")`."""
        found = re.findall(r"\([^)]*\)|\w", self.pattern.split(" -> ")[0])
        return tuple(re.sub(r"\W", "", group) for group in found)

    @cached_property
    def dims(self) -> str:
        """The dims in memory: `ndh`."""
        return self.pattern.split(" -> ")[1].replace(" ", "")

    def shape(self, size: Mapping[str, int]) -> tuple[int, ...]:
        """Shape in memory, for these sizes."""
        return tuple(size[dim] for dim in self.dims)

    @cached_property
    def inputs(self) -> str:
        """The dims in memory that a product contracts with its input; none for vectors."""
        return "".join(d for d in self.dims if len(self.groups) > 1 and d in self.groups[-1])

    @cached_property
    def each(self) -> str:
        """The dim that counts products of the same kind: experts."""
        return self.groups[0] if len(self.groups) > 2 else ""

    @cached_property
    def outputs(self) -> str:
        """The dims in memory that a product makes."""
        return "".join(d for d in self.dims if d not in self.inputs + self.each)

    @property
    def adapter_dims(self) -> tuple[str, str]:
        """The dims of A and of B."""
        return f"{self.each}{self.inputs}r", f"{self.each}r{self.outputs}"

    @cached_property
    def equations(self) -> tuple[str, str, str]:
        """Equations of y = x·W, low = x·A and y = low·B, for x [b, t, inputs]; c comes first in y. For experts, see
        `moe.py`.
        """
        (a, b), made = self.adapter_dims, self.outputs.replace("c", "")
        y = f"{'c' if 'c' in self.outputs else ''}bt{made}"
        return f"bt{self.inputs},{self.dims}->{y}", f"bt{self.inputs},{a}->btr", f"btr,{b}->{y}"

    def axes_of(self, dims: str) -> tuple[Axes, ...]:
        """Mesh axes of the weight itself (`self.dims`) or of its adapter; `()`: replicated.

        Norms and scalars are small, and replicated.
        """
        own = self.axes if dims == self.dims else {**self.axes, **self.adapter_axes}
        found = tuple({**AXES, **own}.get(dim) for dim in dims)
        return found if len(self.dims) > 1 and any(found) else ()


OUTER = (
    Weight(EMBEDDING, "v d -> v d", "embed_tokens.weight"),
    Weight("final_norm.scale", "d -> d", "norm.weight"),
    Weight("embedder.per_layer_model_projection.w", "(l p) d -> d l p", "per_layer_model_projection.weight",
           only=_per_layer, axes={"p": TP}),
    Weight("embedder.per_layer_projection_norm.scale", "p -> p", "per_layer_projection_norm.weight", only=_per_layer),
    Weight(PER_LAYER_TABLE, "u w -> u w", "embed_tokens_per_layer.weight", only=_per_layer),
    Weight(PROJECTOR, "d i -> i d", f"{BESIDE_TEXT}embedding_projection.weight", only=_pictures),
)  # fmt: skip
"""The weights outside the layers."""

LAYER = (
    Weight("pre_attention_norm.scale", "d -> d", "input_layernorm.weight"),
    Weight("attn.q_einsum.w", "(n h) d -> n d h", "self_attn.q_proj.weight", role="attention", fold=0),
    Weight("attn._query_norm.scale", "h -> h", "self_attn.q_norm.weight"),
    Weight("attn.attn_vec_einsum.w", "d (n h) -> n h d", "self_attn.o_proj.weight", role="attention", fold=3),
    Weight("post_attention_norm.scale", "d -> d", "post_attention_layernorm.weight"),
    Weight("pre_ffw_norm.scale", "d -> d", "pre_feedforward_layernorm.weight"),
    Weight("mlp.gate_proj.kernel", "f d -> d f", "mlp.gate_proj.weight", role="mlp", fold=4),
    Weight("mlp.up_proj.kernel", "f d -> d f", "mlp.up_proj.weight", role="mlp", fold=5),
    Weight("mlp.down_proj.kernel", "d f -> f d", "mlp.down_proj.weight", role="mlp", fold=6),
    Weight("post_ffw_norm.scale", "d -> d", "post_feedforward_layernorm.weight"),
    Weight("skip_scale", "s -> s", "layer_scalar"),
    Weight("attn._key_norm.scale", "h -> h", "self_attn.k_norm.weight", only=_own_kv),
    Weight("attn.k_einsum.w", "(k h) d -> k d h", "self_attn.k_proj.weight", role="attention", fold=2,
           only=_one_for_k_and_v),
    Weight("attn.kv_einsum.w", "(k h) d -> c k d h", "self_attn.k_proj.weight self_attn.v_proj.weight",
           role="attention", fold=1, only=_k_and_v),
    Weight("moe_pre_ffw_norm.scale", "d -> d", "pre_feedforward_layernorm_2.weight", only=_experts),
    Weight("moe_post_ffw_norm.scale", "d -> d", "post_feedforward_layernorm_2.weight", only=_experts),
    Weight("dense_post_ffw_norm.scale", "d -> d", "post_feedforward_layernorm_1.weight", only=_experts),
    # Every chip routes its own tokens, so each has the whole router; `moe.py` explains why experts are split by x
    # alone.
    Weight("moe.router_logits", "e d -> d e", "router.proj.weight", only=_experts, axes={"d": None}),
    Weight("moe.router_scale", "d -> d", "router.scale", only=_experts),
    Weight("moe.per_expert_scale", "e -> e", "router.per_expert_scale", only=_experts),
    Weight("moe.gating_einsum", "e (c x) d -> e c x d", "experts.gate_up_proj", role="experts", only=_experts,
           axes={"d": None}, adapter_axes={"d": AXES["x"]}),
    Weight("moe.linear", "e d x -> e x d", "experts.down_proj", role="experts", only=_experts,
           axes={"d": None}, adapter_axes={"d": AXES["x"]}),
    Weight("per_layer_input_gate.w", "p d -> d p", "per_layer_input_gate.weight", only=_per_layer),
    Weight("per_layer_projection.w", "d p -> p d", "per_layer_projection.weight", only=_per_layer),
    Weight("post_per_layer_input_norm.scale", "d -> d", "post_per_layer_input_norm.weight", only=_per_layer),
)  # fmt: skip
"""The weights of a layer."""

BY_NAME = {weight.name: weight for weight in (*OUTER, *LAYER)}
ROLES = tuple(dict.fromkeys(weight.role for weight in LAYER if weight.role))
"""Names in `lora.targets` that stand for several weights each."""
MODULES = {module: weight.role for weight in LAYER for module in weight.modules if module}
"""Single modules in `lora.targets`, and the role of each."""


def sizes(arch: Architecture, layer: int = 0) -> dict[str, int]:
    """Size of every dim, by its letter; `layer` selects where layers differ."""
    return {
        "v": arch.vocab_size, "d": arch.embed_dim, "n": arch.num_heads, "k": arch.layer_kv_heads(layer),
        "h": arch.layer_head_dim(layer), "f": arch.layer_hidden_dim(layer), "l": arch.num_layers,
        "e": arch.num_experts, "x": arch.expert_dim, "c": 2, "s": 1, "p": arch.per_layer_input_dim,
        "u": arch.vocab_size_per_layer_input, "w": arch.num_layers * arch.per_layer_input_dim,
        "i": arch.vision.dim if arch.vision else 0,
    }  # fmt: skip


def rows(arch: Architecture, layer: int | None = None) -> list[Weight]:
    """The weights of a layer of a model; None: those outside its layers."""
    return [weight for weight in (OUTER if layer is None else LAYER) if weight.only(arch, layer or 0)]
