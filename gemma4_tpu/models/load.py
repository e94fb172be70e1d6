"""Base weights onto the mesh: from safetensors, slice by slice, or drawn at random.

Each process reads only what its own devices hold, one array at a time, every byte once. Host memory holds this
process's part of one array (and one tensor under way per reader thread), whatever the size of the model.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.errors import UserError
from gemma4_tpu.models.layout import Layout, Leaf, get
from gemma4_tpu.models.names import Tensor, match, name_map
from gemma4_tpu.models.tensorfile import Checkpoint

logger = logging.getLogger(__name__)

_READERS = min(4, os.cpu_count() or 1)
_TILE = 256  # rows and columns that a transposing copy moves at a time: about what a core's cache holds
_WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

Box = tuple[tuple[int, int], ...]
"""(start, stop) per dim."""


Then = Callable[[Leaf, jax.Array], Any]


def _keep(leaf: Leaf, array: jax.Array) -> jax.Array:
    return array


def load_params(
    checkpoint: Checkpoint, arch: Architecture, layout: Layout, shardings: Any, dtype: Any, then: Then = _keep
) -> Any:
    """The base parameters of `arch` as sharded arrays, in the tree and the stacking of `layout`.

    Args:
      checkpoint: an open checkpoint folder.
      arch: what the tensors must match.
      layout: `Layout.of(arch)`.
      shardings: tree like the parameters, a NamedSharding for each array.
      dtype: of the arrays; weights on disk (float32, bfloat16 or float16) are converted.
      then: what becomes of each array as soon as it is there (quantising, say), before the next one is read.

    Raises:
      UserError: missing, unexpected, wrongly shaped or quantised tensors (before anything is read), or weights that
        hold NaN or infinity; names the tensors.
    """
    started = time.perf_counter()
    found = match(arch, {name: checkpoint.shape(name) for name in checkpoint.names()}, checkpoint.folder)
    tensors = name_map(arch)
    _check_dtypes(checkpoint, tensors, found.prefix)

    def read(hf_name: str, index: Any, shape: tuple[int, ...]) -> np.ndarray:
        return checkpoint.read(found.prefix + hf_name, index, shape)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="read-weights") as readers:

        def array(leaf: Leaf) -> jax.Array:
            sharding = get(shardings, leaf.path)
            loaded = _load_array(leaf, sharding, np.dtype(dtype), tensors, read, readers)
            _check_finite(loaded, leaf, sharding.mesh, tensors, checkpoint.folder)
            return then(leaf, loaded)

        params = layout.tree(array)
    total_bytes = sum(a.nbytes for a in jax.tree.leaves(params))
    logger.info(
        "loaded %d tensors of %s as %s, %.2f GB in all, in %.1f s; left alone: %d tensors of other modalities, tied or"
        " unused", len(tensors), checkpoint.folder, np.dtype(dtype).name, total_bytes / 1e9,
        time.perf_counter() - started, len(found.passthrough),
    )  # fmt: skip
    return params


def _check_dtypes(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], prefix: str) -> None:
    for tensor in tensors.values():
        for name in tensor.hf_names:
            if (dtype := checkpoint.dtype(prefix + name).name) not in _WEIGHT_DTYPES:
                raise UserError(
                    f"{checkpoint.file_of(prefix + name).path}: {prefix + name} is stored as {dtype}: a quantised"
                    f" checkpoint; give the original one ({', '.join(_WEIGHT_DTYPES)})"
                )


def _load_array(
    leaf: Leaf, sharding: NamedSharding, dtype: np.dtype, tensors: Mapping[str, Tensor], read: Any, readers: Any
) -> jax.Array:
    """One array: host buffers for the distinct shards of this process, filled tensor by tensor, then sent."""
    shape = leaf.array_shape
    indices = sharding.addressable_devices_indices_map(shape).values()
    shards = {box: np.empty([stop - start for start, stop in box], dtype) for box in {_box(i, shape) for i in indices}}
    stack = 1 if leaf.stacked else 0
    if stack and any(box[0] != (0, shape[0]) for box in shards):
        raise ValueError(f"{leaf.path}: the stacked dim cannot be sharded: {sharding.spec}")
    own = [(box[stack:], buffer if stack else buffer[None]) for box, buffer in shards.items()]
    # the smallest block of the tensor that covers every shard here, so that each byte is read once
    cover = [(min(a for a, _ in dim), max(b for _, b in dim)) for dim in zip(*(box for box, _ in own), strict=True)]

    def fill(repeat: int) -> None:
        block = tensors[leaf.tunix_names[repeat]].from_hf(read, [slice(*bounds) for bounds in cover])
        for box, buffer in own:
            inner = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(box, cover, strict=True))
            _copy(buffer[repeat], block[inner])

    list(readers.map(fill, range(len(leaf.tunix_names))))
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[_box(index, shape)], dtype=dtype)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` with conversion; transposed matrices go in tiles, several times faster than as a whole."""
    if target.dtype == source.dtype:  # plain integers of the same size move fastest, and without Python's lock
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


@cache
def _finite(mesh: Mesh, stacked: bool) -> Any:
    """Jitted: whether all values are finite, one answer per repeat, the same on every process."""

    def check(x: jax.Array) -> jax.Array:
        return jnp.atleast_1d(jnp.isfinite(x).all(axis=tuple(range(int(stacked), x.ndim))))

    return jax.jit(check, out_shardings=NamedSharding(mesh, P()))


def _check_finite(array: jax.Array, leaf: Leaf, mesh: Mesh, tensors: Mapping[str, Tensor], where: str) -> None:
    good = np.asarray(_finite(mesh, leaf.stacked)(array))
    bad = [name for repeat in np.flatnonzero(~good) for name in tensors[leaf.tunix_names[repeat]].hf_names]
    if bad:
        raise UserError(f"{where}: NaN or infinity in {', '.join(bad)}: a damaged file, or weights that diverged")


def random_params(arch: Architecture, layout: Layout, shardings: Any, dtype: Any, seed: int, then: Then = _keep) -> Any:
    """Random base parameters made on the devices that hold them: matrices normal with variance 1/fan_in, the rest ones.

    A tensor's values depend on the seed and its name only: not on mesh, stacking or the other tensors. `then` as in
    `load_params`.
    """
    tensors = name_map(arch)
    key = jax.random.key(seed)

    def array(leaf: Leaf) -> jax.Array:
        names, sharding = leaf.tunix_names, get(shardings, leaf.path)
        if len(leaf.shape) == 1:
            return then(leaf, jax.jit(partial(jnp.ones, leaf.array_shape, dtype), out_shardings=sharding)())
        keys = jax.vmap(partial(jax.random.fold_in, key))(
            jnp.array([zlib.crc32(n.encode()) for n in names], jnp.uint32)
        )
        std = tensors[names[0]].hf_shape[-1] ** -0.5
        return then(leaf, _draw(leaf.array_shape, leaf.stacked, jnp.dtype(dtype), sharding)(keys, std))

    return layout.tree(array)


@cache
def _draw(shape: tuple[int, ...], stacked: bool, dtype: Any, sharding: NamedSharding) -> Any:
    """Jitted: normal values of this shape, one key per repeat."""

    def draw(keys: jax.Array, std: jax.Array) -> jax.Array:
        normal = partial(jax.random.normal, shape=shape[1:] if stacked else shape)
        return (std * jax.vmap(normal)(keys)).reshape(shape).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def by_name(params: Any, layout: Layout) -> dict[str, jax.Array]:
    """The parameters unstacked, by Tunix name."""
    found: dict[str, jax.Array] = {}
    for leaf in layout.leaves():
        array = get(params, leaf.path)
        found |= dict(zip(leaf.tunix_names, array if leaf.stacked else [array], strict=True))
    return found
