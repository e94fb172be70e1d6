"""Places base weights on the mesh: from safetensors, slice by slice, or drawn at random.

Each process reads only what its own devices hold, one array at a time, every byte once. Host memory holds this
process's part of one array (and one tensor in transit per reader thread), whatever the size of the model.
"""

from __future__ import annotations

import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.layout import Layout, Leaf, get
from gemma4_tpu.models.match import check_tied, fit
from gemma4_tpu.models.names import full_name, name_map
from gemma4_tpu.models.tensorfile import Checkpoint
from gemma4_tpu.models.weights import EMBEDDING

logger = logging.getLogger(__name__)

_READERS = min(4, os.cpu_count() or 1)
_TILE = 256  # rows and columns per tile of a transposing copy: about what a core's cache holds
_ALIGNMENT = 64  # bytes
_CHUNK = 1 << 20  # values checked at a time

Box = tuple[tuple[int, int], ...]
"""(start, stop) per dim."""

Source = Callable[[str, Box], np.ndarray]
"""`source(tunix_name, box)` → that block of a tensor in its in-memory layout, in any dtype."""

Then = Callable[[Leaf, jax.Array], Any]
"""Applied to an array once it is loaded, before the next one is read (to quantise it, say)."""


def _keep(leaf: Leaf, array: jax.Array) -> jax.Array:
    return array


def load_params(
    checkpoint: Checkpoint, arch: Architecture, layout: Layout, shardings: Any, dtype: Any, then: Then = _keep,
    float32: Collection[str] = (),
) -> Any:  # fmt: skip
    """Loads the base parameters of `arch` as sharded arrays, in the tree and stacking of `layout`.

    Args:
      checkpoint: an open checkpoint folder.
      arch: what the tensors must match.
      layout: `Layout.of(arch)`.
      shardings: tree like the parameters, a NamedSharding for each array.
      dtype: of the arrays; weights on disk (float32, bfloat16 or float16) are converted.
      then: applied to each array.
      float32: names of rows of `weights.py` whose arrays are float32 instead.

    Raises:
      UserError: tensors are missing, unexpected, misshapen or quantised (before anything is read), an output matrix
        differs from the embedding, or weights contain NaN or infinity (on the processes that read them); names the
        tensors.
    """
    started = time.perf_counter()
    found, tensors = fit(arch, checkpoint), name_map(arch)

    def read(hf_name: str, index: Any, shape: tuple[int, ...]) -> np.ndarray:
        return checkpoint.read(full_name(found.prefix, hf_name), index, shape)

    def source(name: str, box: Box) -> np.ndarray:
        block = tensors[name].from_hf(read, _slices(box))
        if name == EMBEDDING:
            check_tied(checkpoint, found, _slices(box), block)
        return block

    params = _params(layout, shardings, _dtypes(dtype, float32), source, then, checkpoint.folder)
    logger.info(
        "loaded %d tensors of %s as %s in %.1f s; skipped %d of other modalities, tied or unused",
        len(tensors), checkpoint.folder, np.dtype(dtype).name, time.perf_counter() - started, len(found.passthrough),
    )  # fmt: skip
    return params


def random_params(
    arch: Architecture, layout: Layout, shardings: Any, dtype: Any, seed: int, then: Then = _keep,
    float32: Collection[str] = (),
) -> Any:  # fmt: skip
    """Random base parameters: matrices uniform around 0 with variance 1/fan_in, vectors (norms, scales) ones.

    A tensor's values depend only on the seed and its name, not on mesh, stacking or other tensors. Arguments as for
    `load_params`.
    """
    tensors = name_map(arch)

    def source(name: str, box: Box) -> np.ndarray:
        tensor = tensors[name]
        if len(tensor.shape) == 1:
            return np.ones([stop - start for start, stop in box], np.float32)
        values = np.random.default_rng((seed, zlib.crc32(name.encode()))).random(tensor.shape, np.float32)
        values -= 0.5
        values *= math.sqrt(12 / tensor.hf_shape[-1])  # [0, 1) has variance 1/12
        return values[_slices(box)]

    return _params(layout, shardings, _dtypes(dtype, float32), source, then, f"random:{seed}")


def _dtypes(dtype: Any, float32: Collection[str]) -> Callable[[Leaf], np.dtype]:
    return lambda leaf: np.dtype(np.float32 if leaf.weight.name in float32 else dtype)


def _params(
    layout: Layout, shardings: Any, dtype: Callable[[Leaf], np.dtype], source: Source, then: Then, where: str
) -> Any:
    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-weights") as readers:

        def value(leaf: Leaf) -> Any:
            return then(leaf, _array(leaf, get(shardings, leaf.path), dtype(leaf), source, readers, where))

        return layout.tree(value)


def _array(
    leaf: Leaf, sharding: NamedSharding, dtype: np.dtype, source: Source, readers: ThreadPoolExecutor, where: str
) -> jax.Array:
    """One array: host buffers for the distinct shards of this process, filled tensor by tensor, then transferred."""
    shape = leaf.array_shape
    indices = sharding.addressable_devices_indices_map(shape).values()
    shards = {box: _buffer([stop - start for start, stop in box], dtype) for box in {_box(i, shape) for i in indices}}
    stack = 1 if leaf.stacked else 0
    if stack and any(box[0] != (0, shape[0]) for box in shards):
        raise ValueError(f"{leaf.path}: the stacked dim cannot be sharded: {sharding.spec}")
    own = [(box[stack:], buffer if stack else buffer[None]) for box, buffer in shards.items()]
    # the smallest block of the tensor that covers every local shard, so that each byte is read once
    cover = tuple(
        (min(start for start, _ in dim), max(stop for _, stop in dim))
        for dim in zip(*(box for box, _ in own), strict=True)
    )

    def fill(repeat: int) -> None:
        block = source(leaf.tunix_names[repeat], cover)
        for box, buffer in own:
            inner = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(box, cover, strict=True))
            _copy(buffer[repeat], block[inner])
            if not _is_finite(buffer[repeat]):
                name = leaf.tunix_names[repeat]
                raise UserError(f"{where}: NaN or infinity in {name}: a damaged file, or a model that diverged")

    list(readers.map(fill, range(len(leaf.tunix_names))))
    array = jax.make_array_from_callback(shape, sharding, lambda index: shards[_box(index, shape)], dtype=dtype)
    return jax.block_until_ready(array)  # so that these buffers are freed before the next ones are filled


def _buffer(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """New memory that a CPU device takes as its own array where it lies, which JAX does from this alignment on."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` with conversion; transposed matrices are copied in tiles, several times faster
    than whole.
    """
    if target.dtype == source.dtype:  # copying as integers of the same size is fastest, and releases Python's lock
        bits = np.dtype(f"u{target.itemsize}")
        target, source = target.view(bits), source.view(bits)
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
    elif source.ndim > 2:
        for row, values in zip(target, source, strict=True):
            _copy(row, values)
    else:
        for i in range(0, source.shape[0], _TILE):
            for j in range(0, source.shape[1], _TILE):
                target[i : i + _TILE, j : j + _TILE] = source[i : i + _TILE, j : j + _TILE]


def _is_finite(values: np.ndarray) -> bool:
    """Whether no float is NaN or infinite: as integers, sign aside, these compare greater than all others."""
    kind = np.dtype(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(kind)
    flat = values.reshape(-1).view(kind)
    magnitude = kind.type(np.iinfo(kind).max >> 1)
    return all((flat[i : i + _CHUNK] & magnitude).max() < infinity for i in range(0, flat.size, _CHUNK))


def by_name(params: Any, layout: Layout) -> dict[str, jax.Array]:
    """The parameters unstacked, by Tunix name."""
    found: dict[str, jax.Array] = {}
    for leaf in layout.leaves():
        array = get(params, leaf.path)
        found |= dict(zip(leaf.tunix_names, array if leaf.stacked else [array], strict=True))
    return found
