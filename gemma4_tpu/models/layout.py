"""How a model's layers lie in memory: layers of equal structure are stacked, so that one `lax.scan` runs them all.

Gemma 4 repeats a group of layers (five sliding, one global). A *stage* holds R repeats of one group as arrays with a
leading dim R; the step compiles the group once instead of once per layer. On disk every tensor keeps its own name
(`layers.7.attn.q_einsum.w`), so a checkpoint does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gemma4_tpu.architectures import Architecture

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Stage:
    """R repeats of a group of J layers; layer numbers as `[R][J]`."""

    layers: tuple[tuple[int, ...], ...]
    exports_kv: bool = False
    """The last layers of each type leave their keys and values for KV-shared layers of later stages."""

    @property
    def repeats(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree and the per-layer tensors it is stacked from."""

    path: Path
    """Place in the tree: `("stages", 0, 2, "attn", "q_einsum", "w")` or `("embedder", "input_embedding")`."""
    tunix_names: tuple[str, ...]
    """Names of the stacked tensors, one per repeat."""
    shape: tuple[int, ...]
    """Shape of one tensor, without the leading dim R."""
    stacked: bool

    @property
    def array_shape(self) -> tuple[int, ...]:
        return (len(self.tunix_names), *self.shape) if self.stacked else self.shape


def layer_shapes(arch: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one layer under Tunix's names, without the `layers.N.` prefix."""
    d, f = arch.embed_dim, arch.layer_hidden_dim(layer)
    n, k, h = arch.num_heads, arch.layer_kv_heads(layer), arch.layer_head_dim(layer)
    shapes: dict[str, tuple[int, ...]] = {
        "pre_attention_norm.scale": (d,),
        "attn.q_einsum.w": (n, d, h),
        "attn._query_norm.scale": (h,),
        "attn.attn_vec_einsum.w": (n, h, d),
        "post_attention_norm.scale": (d,),
        "pre_ffw_norm.scale": (d,),
        "mlp.gate_proj.kernel": (d, f),
        "mlp.up_proj.kernel": (d, f),
        "mlp.down_proj.kernel": (f, d),
        "post_ffw_norm.scale": (d,),
        "skip_scale": (1,),
    }
    if not arch.is_kv_shared(layer):
        shapes["attn._key_norm.scale"] = (h,)
        if arch.is_global(layer) and arch.k_eq_v:
            shapes["attn.k_einsum.w"] = (k, d, h)
        else:
            shapes["attn.kv_einsum.w"] = (2, k, d, h)
    if arch.num_experts:
        e, fe = arch.num_experts, arch.expert_dim
        shapes |= {
            "moe_pre_ffw_norm.scale": (d,),
            "moe_post_ffw_norm.scale": (d,),
            "dense_post_ffw_norm.scale": (d,),
            "moe.router_logits": (d, e),
            "moe.router_scale": (d,),
            "moe.per_expert_scale": (e,),
            "moe.gating_einsum": (e, 2, fe, d),
            "moe.linear": (e, fe, d),
        }
    if p := arch.per_layer_input_dim:
        shapes |= {
            "per_layer_input_gate.w": (d, p),
            "per_layer_projection.w": (p, d),
            "post_per_layer_input_norm.scale": (d,),
        }
    return shapes


def outer_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers under Tunix's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedder.input_embedding": (arch.vocab_size, arch.embed_dim),
        "final_norm.scale": (arch.embed_dim,),
    }
    if p := arch.per_layer_input_dim:
        shapes |= {
            "embedder.per_layer_model_projection.w": (arch.embed_dim, arch.num_layers, p),
            "embedder.per_layer_projection_norm.scale": (p,),
            # Tunix has [V, L, P]; in whole rows a TPU neither pads the table nor copies it for the lookup
            "embedder.per_layer_input_embedding": (arch.vocab_size_per_layer_input, arch.num_layers * p),
        }
    return shapes


def _stages(arch: Architecture) -> tuple[Stage, ...]:
    """Cuts the layers into stages: repeats of the shortest period, split where KV sharing begins."""
    stages = []
    shared_from = arch.num_unshared_layers
    for start, stop in ((0, shared_from), (shared_from, arch.num_layers)):
        kinds = [(arch.layer_types[i], arch.layer_hidden_dim(i)) for i in range(start, stop)]
        if not kinds:
            continue
        n = len(kinds)
        period = next(p for p in range(1, n + 1) if all(kinds[i] == kinds[i % p] for i in range(n)))
        repeats = [tuple(range(i, i + period)) for i in range(start, start + n - n % period, period)]
        rest = tuple(range(start + n - n % period, stop))
        exporting = bool(arch.num_kv_shared_layers) and start == 0
        if exporting:  # the layers that KV-shared ones read stand in a stage of their own
            first = min(arch.kv_origin(i) for i in range(shared_from, arch.num_layers))
            own = [r for r in repeats if r[-1] >= first]
            repeats = [r for r in repeats if r[-1] < first]
            rest = tuple(i for r in own for i in r) + rest
        if repeats:
            stages.append(Stage(tuple(repeats)))
        if rest:
            stages.append(Stage((rest,), exports_kv=exporting))
    return tuple(stages)


@dataclass(frozen=True)
class Layout:
    """The parameter tree of an architecture: `{"embedder", "final_norm", "stages": [[layer, …J], …]}`."""

    arch: Architecture
    stages: tuple[Stage, ...]

    @staticmethod
    @cache
    def of(arch: Architecture) -> Layout:
        """The layout of an architecture."""
        return Layout(arch, _stages(arch))

    def leaves(self) -> Iterator[Leaf]:
        """Every array of the base model."""
        for name, shape in outer_shapes(self.arch).items():
            yield Leaf(tuple(name.split(".")), (name,), shape, stacked=False)
        for path, layers in self.groups():
            for name, shape in layer_shapes(self.arch, layers[0]).items():
                names = tuple(f"layers.{i}.{name}" for i in layers)
                yield Leaf((*path, *name.split(".")), names, shape, stacked=True)

    def groups(self) -> Iterator[tuple[Path, tuple[int, ...]]]:
        """`(path of a stacked layer, the layer numbers stacked in it)`."""
        for s, stage in enumerate(self.stages):
            for j in range(len(stage.layers[0])):
                yield ("stages", s, j), tuple(group[j] for group in stage.layers)

    def tree(self, value: Callable[[Leaf], Any]) -> dict[str, Any]:
        """The parameter tree with `value(leaf)` at every leaf."""
        return build_tree((leaf.path, value(leaf)) for leaf in self.leaves())


def build_tree(items: Iterator[tuple[Path, Any]]) -> dict[str, Any]:
    """Nested dicts (lists where the path has numbers) from `(path, value)` pairs."""
    root: dict[str | int, Any] = {}
    for path, value in items:
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return _listify(root)


def _listify(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    children = {k: _listify(v) for k, v in node.items()}
    if children and all(isinstance(k, int) for k in children):
        return [children[i] for i in range(len(children))]
    return children


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """The node of `tree` at `path`."""
    node: Any = tree
    for key in path:
        node = node[key]
    return node
