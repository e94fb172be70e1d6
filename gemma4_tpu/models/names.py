"""The one map of names: how each tensor is named and laid out in memory (Tunix) and on disk (Hugging Face).

It follows from the patterns of `weights.py`. A pattern only splits and reorders dims, so any slice of one side is a
slice of the other: a device's shard is read from disk without the rest. Loading, merging and PEFT export all use this
map; it needs NumPy only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.adapted import Adapted
from gemma4_tpu.models.expert_files import to_files
from gemma4_tpu.models.weights import BESIDE_TEXT, Weight, rows, sizes

HEAD = "lm_head.weight"
"""A stored output matrix, without prefix."""
PEFT_PREFIX = "base_model.model."
"""What PEFT prepends to the names of the model that it wraps."""
MAGNITUDE = "magnitude_vector"
"""PEFT's name of DoRA's magnitudes, after `lora_`."""
# PEFT's name of a factor, with the adapter's name (`.default`) in files that PEFT itself did not save; and the parts of
# a module's path that exist only because the model was wrapped: by PEFT, a class of transformers, DDP, FSDP,
# torch.compile or activation checkpointing.
_PEFT_KEY = re.compile(rf"(?P<module>.+)\.lora_(?P<factor>[AB](?=.*\.weight)|{MAGNITUDE})(?:\.[^.]+)?(?:\.weight)?")
_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")
_WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS = {"base_model", "model", "language_model", *_WRAPPED}

Index = Sequence[slice]
Read = Callable[[str, Index, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Tensor:
    """One tensor on both sides."""

    weight: Weight
    """Its row."""
    name: str
    """In memory: `layers.3.attn.kv_einsum.w`."""
    shape: tuple[int, ...]
    """In memory: `[2, K, D, H]`."""
    hf_names: tuple[str, ...]
    """On disk, without the checkpoint's prefix: `layers.3.self_attn.k_proj.weight` and that of `v_proj`."""
    hf_shape: tuple[int, ...]
    """On disk, of each: `[K*H, D]`."""
    split: tuple[int, ...]
    """The dims on disk after splitting: `[K, H, D]`."""
    order: tuple[int, ...]
    """The split dim that each dim in memory corresponds to (ignoring a leading dim of several sources): `(0, 2, 1)`."""

    @property
    def several(self) -> bool:
        """Whether the leading dim in memory counts sources on disk."""
        return len(self.weight.hf_names) > 1

    def of_pieces(self, pieces: Sequence[int]) -> Tensor:
        """The part of it that some of its sources on disk make up."""
        if not self.several:
            return self
        names = tuple(self.hf_names[i] for i in pieces)
        return replace(self, hf_names=names, shape=(len(pieces), *self.shape[1:]))

    def from_hf(self, read: Read, index: Index | None = None) -> np.ndarray:
        """The slice `index` of the tensor in its in-memory layout (in the dtype on disk, often a view).

        Args:
          read: `read(hf_name, index, shape)` → that slice of the tensor `hf_name` (without prefix) viewed with dims
            `shape`; `Checkpoint.read` does this.
          index: one slice per dim in memory; None: all of it.
        """
        index = [slice(None)] * len(self.shape) if index is None else list(index)
        sources = self.hf_names[index.pop(0)] if self.several else self.hf_names
        on_disk = [index[self.order.index(i)] for i in range(len(index))]
        pieces = [read(name, on_disk, self.split).transpose(self.order) for name in sources]
        return np.stack(pieces) if self.several else pieces[0]

    def to_hf(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors on disk (without prefix) that `array`, in its in-memory layout, represents."""
        back = np.argsort(self.order)
        parts = array if self.several else [array]
        return {
            name: part.transpose(back).reshape(self.hf_shape) for name, part in zip(self.hf_names, parts, strict=True)
        }

    def in_memory(self, on_disk: Index, source: int) -> tuple[slice | int, ...]:
        """Where the slice `on_disk` (one for each split dim) of the tensor on disk number `source` is in memory."""
        index = tuple(on_disk[dim] for dim in self.order)
        return (source, *index) if self.several else index

    def split_on_disk(self, block: np.ndarray) -> np.ndarray:
        """A block taken at `in_memory`, as a view with the dims on disk after splitting."""
        return block.transpose(np.argsort(self.order))

    @property
    def lora_names(self) -> tuple[str, str]:
        """Names of the adapter's two arrays."""
        return f"{self.name}_lora_a", f"{self.name}_lora_b"

    @property
    def magnitude_name(self) -> str:
        """Name of DoRA's array."""
        return f"{self.name}_lora_magnitude"

    def magnitudes(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """DoRA's magnitudes [out] by Hugging Face weight name."""
        return dict(zip(self.hf_names, array.reshape(len(self.hf_names), -1), strict=True))

    def lora_factors(self, lora_a: np.ndarray, lora_b: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The adapter as pairs (A `[r, in]`, B `[out, r]`) by Hugging Face weight name, in float32, unscaled.

        For experts, A is `[E, r, in]` and B `[E, out, r]`. The delta of a weight `[out, in]` is scale · B @ A. K and V
        of a fused projection share A.

        Raises:
          UserError: shapes do not match this weight or each other; names the tensor.
        """
        *each, out_size, in_size = self.hf_shape
        rank, copies = lora_a.shape[-1], math.prod(each)
        expected = (copies * in_size * rank, copies * rank * out_size * len(self.hf_names))
        if (lora_a.size, lora_b.size) != expected or lora_b.shape[len(each)] != rank:
            raise UserError(
                f"{self.name}: lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit its weights"
                f" {list(self.hf_names)} of shape {list(self.hf_shape)}"
            )
        a = np.asarray(lora_a, np.float32).reshape(*each, in_size, rank).swapaxes(-1, -2)
        b = np.asarray(lora_b, np.float32).reshape(*each, rank, len(self.hf_names), out_size)
        return {name: (a, b[..., i, :].swapaxes(-1, -2)) for i, name in enumerate(self.hf_names)}

    def from_lora_factors(
        self, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], rank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inverts `lora_factors`: A `[in, rank]` and B `[rank, sources, out]` in float32, zero in unused ranks; for
        experts with a leading dim.

        K and V of a fused projection share A, so separate A matrices use separate ranks.

        Args:
          factors: pairs as returned by `lora_factors`, of some of this tensor's weights.
          rank: of the result, at least `lora_rank(…)`.
        """
        *each, out_size, in_size = self.hf_shape
        a = np.zeros((*each, in_size, rank), np.float32)
        b = np.zeros((*each, rank, len(self.hf_names), out_size), np.float32)
        start = 0
        shared = _share_a(list(factors.values()))
        for name, (factor_a, factor_b) in factors.items():
            used = slice(start, start + factor_a.shape[-2])
            a[..., used] = factor_a.swapaxes(-1, -2)
            b[..., used, self.hf_names.index(name), :] = factor_b.swapaxes(-1, -2)
            start += 0 if shared else factor_a.shape[-2]
        return a, b

    @staticmethod
    def lora_rank(factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> int:
        """The rank that `from_lora_factors` needs: that of A if the weights share it, else the sum of their ranks."""
        pairs = list(factors.values())
        return pairs[0][0].shape[-2] if _share_a(pairs) else sum(a.shape[-2] for a, _ in pairs)


def full_name(prefix: str, hf_name: str) -> str:
    """A name on disk with the checkpoint's prefix; the projector of pictures is outside the text model."""
    return (prefix.removesuffix("language_model.") if hf_name.startswith(BESIDE_TEXT) else prefix) + hf_name


def peft_names(hf_name: str, prefix: str) -> tuple[str, str]:
    """PEFT's names of A and B of the weight `hf_name`, for a base checkpoint whose keys have `prefix`."""
    module = f"{PEFT_PREFIX}{prefix}{hf_name.removesuffix('.weight')}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def peft_magnitude_name(hf_name: str, prefix: str) -> str:
    """PEFT's name of DoRA's magnitudes of the weight `hf_name`."""
    return f"{PEFT_PREFIX}{prefix}{hf_name.removesuffix('.weight')}.lora_{MAGNITUDE}"


def from_peft_name(name: str) -> tuple[str, str, str] | None:
    """Inverts `peft_names` for every spelling in use; None if the name is not that of an adapter's factor.

    Returns:
      (weight, factor, module): the weight's name without prefix (`layers.3.self_attn.q_proj.weight`; with its path in
      other parts of a model); `A`, `B` or `magnitude_vector`; and the module's path in the unwrapped base model, as
      PEFT's patterns refer to it.
    """
    found = _PEFT_KEY.fullmatch(name)
    if found is None:
        return None
    module = ".".join(part for part in found["module"].split(".") if part not in _WRAPPED)
    weight = _bare(module) + ".weight"
    return weight, found["factor"], module.removeprefix(PEFT_PREFIX)


def from_peft_module(name: str) -> str:
    """The weight, without prefix, that a tensor of a module in PEFT's `modules_to_save` holds."""
    return _bare(_SAVED_MODULE.sub(".", name))


def _bare(module: str) -> str:
    return ".".join(part for part in module.split(".") if part not in _WRAPPERS)


def peft_tensors(
    tensor: Tensor, lora_a: np.ndarray, lora_b: np.ndarray, prefix: str, experts: str = "fused"
) -> dict[str, np.ndarray]:
    """The adapter with PEFT's names and shapes (A `[r, in]`, B `[out, r]`), unscaled; `experts`: the format for
    experts.
    """
    found: dict[str, np.ndarray] = {}
    for name, pair in tensor.lora_factors(lora_a, lora_b).items():
        for module, (a, b) in to_files(name, *pair, experts) if tensor.weight.each else [(name, pair)]:
            found |= {key: np.ascontiguousarray(x) for key, x in zip(peft_names(module, prefix), (a, b), strict=True)}
    return found


def _share_a(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    return all(np.array_equal(pairs[0][0], a) for a, _ in pairs[1:])


@cache
def name_map(arch: Architecture) -> Mapping[str, Tensor]:
    """Every tensor of the base model by its Tunix name."""
    tensors = [_tensor("", weight, sizes(arch)) for weight in rows(arch)]
    for layer in range(arch.num_layers):
        tensors += [_tensor(f"layers.{layer}.", weight, sizes(arch, layer)) for weight in rows(arch, layer)]
    return {tensor.name: tensor for tensor in tensors}


def adapted_tensors(arch: Architecture, adapted: Mapping[str, Adapted]) -> dict[str, Tensor]:
    """The adapted part of each tensor, by its Tunix name; `adapted` is that of a `Layout`."""
    return {name: name_map(arch)[name].of_pieces(how.pieces) for name, how in adapted.items()}


def _tensor(prefix: str, weight: Weight, size: Mapping[str, int]) -> Tensor:
    split = "".join(weight.groups)
    return Tensor(
        weight=weight,
        name=prefix + weight.name,
        shape=weight.shape(size),
        hf_names=tuple(prefix + name for name in weight.hf_names),
        hf_shape=tuple(math.prod(size[dim] for dim in group) for group in weight.groups),
        split=tuple(size[dim] for dim in split),
        order=tuple(split.index(dim) for dim in weight.dims if dim in split),
    )


def some(names: Sequence[str], limit: int = 10) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
