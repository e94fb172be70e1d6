"""How layers are laid out in memory: layers of equal structure are stacked, so that one `lax.scan` runs them all.

Gemma 4 repeats a group of layers (five sliding, one global). A *stage* holds R repeats of one group as arrays with a
leading dim R; the step compiles the group once instead of once per layer. Layers are stacked while loading, because
stacking them in the step would copy every weight. Groups that are adapted differently (other ranks, say) form another
stage, so that all layers of a stack have the same adapter. On disk, every tensor keeps its own name
(`layers.7.attn.q_einsum.w`), so a checkpoint does not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.models.adapted import Adapted, OfLayer, adapted
from gemma4_tpu.models.in_full import names
from gemma4_tpu.models.weights import EMBEDDING, PER_LAYER_TABLE, Axes, Weight, rows, sizes

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class LayerStage:
    """R repeats of a group of J layers; layer numbers as `[R][J]`."""

    layers: tuple[tuple[int, ...], ...]
    exports_kv: bool = False
    """The last layers of each type export their keys and values to KV-shared layers of later stages."""

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
    weight: Weight
    """The row of `weights.py` that it stores, or belongs to."""
    dims: str
    """Letters of the dims of `shape`."""
    adapted: Adapted | None = None
    """How these base weights are adapted; None: they are not."""

    @property
    def axes(self) -> tuple[Axes, ...]:
        """Mesh axes of the dims of `shape`; `()`: replicated."""
        return self.weight.axes_of(self.dims)

    @property
    def array_shape(self) -> tuple[int, ...]:
        return (len(self.tunix_names), *self.shape) if self.stacked else self.shape

    @property
    def matrix(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Positions, in the array, of the dims that its product contracts and of those that it produces; the other dims
        count products: layers, experts, keys and values. None for vectors, and for tables that are only looked up.
        """
        if self.weight.name in (EMBEDDING, PER_LAYER_TABLE):
            return None
        inputs, outputs = self.weight.inputs, self.weight.outputs.replace("c", "")
        if "r" in self.dims:  # A produces the rank, B contracts it
            inputs, outputs = (inputs, "r") if any(dim in inputs for dim in self.dims) else ("r", outputs)
        ends = (tuple(i for i, dim in enumerate(self.dims, self.stacked) if dim in end) for end in (inputs, outputs))
        contracted, made = ends
        return (contracted, made) if contracted and made else None


def _stages(arch: Architecture, adapters: tuple[OfLayer, ...]) -> tuple[LayerStage, ...]:
    """Splits the layers into stages: repeats of the shortest period, cut where KV sharing begins or adapters change."""
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
        if exporting:  # the layers that KV-shared ones read are in a separate stage
            first = min(arch.kv_origin(i) for i in range(shared_from, arch.num_layers))
            own = [r for r in repeats if r[-1] >= first]
            repeats = [r for r in repeats if r[-1] < first]
            rest = tuple(i for r in own for i in r) + rest
        alike = groupby(repeats, key=lambda group: [adapters[i] for i in group])
        stages += [LayerStage(tuple(groups)) for _, groups in alike]
        if rest:
            stages.append(LayerStage((rest,), exports_kv=exporting))
    return tuple(stages)


@dataclass(frozen=True)
class Layout:
    """The parameter tree of an architecture: `{"embedder", "final_norm", "stages": [[layer, …J], …]}`."""

    arch: Architecture
    stages: tuple[LayerStage, ...]
    of_layers: tuple[OfLayer, ...]
    """The adapters of each layer."""
    in_full: frozenset[str]
    """Names, without `layers.N.`, of the weights that are trained themselves."""

    @staticmethod
    def of(arch: Architecture, lora: LoraConfig | None = None) -> Layout:
        """The layout of an architecture with these adapters; None: without adapters.

        Raises:
          UserError: `lora` adapts no weight.
        """
        return _layout(arch, adapted(arch, lora), names(lora) if lora else frozenset())

    @cached_property
    def adapted(self) -> Mapping[str, Adapted]:
        """How weights are adapted, by Tunix name: `layers.7.attn.q_einsum.w`."""
        return {f"layers.{i}.{name}": how for i, layer in enumerate(self.of_layers) for name, how in layer}

    def leaves(self) -> Iterator[Leaf]:
        """Every array of the base model."""
        for weight in rows(self.arch):
            shape = weight.shape(sizes(self.arch))
            yield Leaf(weight.path, (weight.name,), shape, False, weight, weight.dims)
        for path, layers in self.groups():
            size = sizes(self.arch, layers[0])
            for weight in rows(self.arch, layers[0]):
                names = tuple(f"layers.{i}.{weight.name}" for i in layers)
                how = self.adapted.get(names[0])
                yield Leaf((*path, *weight.path), names, weight.shape(size), True, weight, weight.dims, how)

    def trained_in_full(self) -> list[Leaf]:
        """The arrays that are trained themselves."""
        return [leaf for leaf in self.leaves() if leaf.weight.name in self.in_full]

    def groups(self) -> Iterator[tuple[Path, tuple[int, ...]]]:
        """`(path of a stacked layer, the layer numbers stacked in it)`."""
        for s, stage in enumerate(self.stages):
            for j in range(len(stage.layers[0])):
                yield ("stages", s, j), tuple(group[j] for group in stage.layers)

    def tree(self, value: Callable[[Leaf], Any]) -> dict[str, Any]:
        """The parameter tree with `value(leaf)` at every leaf."""
        return build_tree((leaf.path, value(leaf)) for leaf in self.leaves())


@cache
def _layout(arch: Architecture, adapters: tuple[OfLayer, ...], in_full: frozenset[str]) -> Layout:
    return Layout(arch, _stages(arch, adapters), adapters, in_full)


def build_tree(items: Iterator[tuple[Path, Any]]) -> dict[str, Any]:
    """Nested dicts (lists where the path has numbers) from `(path, value)` pairs.

    Positions without a pair, before the last one that has a pair, become `{}`: in the tree of adapters, layers without
    any.
    """
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
        return [children.get(i, {}) for i in range(max(children) + 1)]
    return children


def without(tree: Any, paths: Collection[Path], at: Path = ()) -> Any:
    """A parameter tree (the part of it at `at`) without the leaves at `paths`."""
    if isinstance(tree, list):
        return [without(child, paths, (*at, i)) for i, child in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    return {key: without(child, paths, (*at, key)) for key, child in tree.items() if (*at, key) not in paths}


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """The node of `tree` at `path`."""
    node: Any = tree
    for key in path:
        node = node[key]
    return node
