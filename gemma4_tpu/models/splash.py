"""Attention with JAX's splash kernels on TPU: no [T, T] scores in memory; blocks outside mask and window are skipped.

Segment ids separate packed examples inside the kernel, and blocks without a pair of tokens of one example are skipped
too. KV-shared layers pass the keys they share like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks_info
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_tpu.errors import UserError
from gemma4_tpu.models.attention import einsum_attention
from gemma4_tpu.models.chunked import chunked_attention
from gemma4_tpu.models.context_parallel import (
    blockwise_attention,
    exchange,
    exchanged_places,
    segments_with_halo,
    whole,
    with_halo,
)
from gemma4_tpu.models.remat import CONTEXT
from gemma4_tpu.models.sharding import CP, ROWS, TP, token_parts

LANES = 128
"""The kernels require head widths and lengths in multiples of a TPU register's lanes."""
BLOCK = 512
"""Tokens per block; on v5p, 1024 does not compile for the backward pass at head width 512 (vector memory)."""
EINSUM_TOKENS = 2048
"""Rows up to which a layer's scores are formed, where there is no kernel: 0.3 GB of them in a global layer of 31B."""
FEW = 4
"""Tokens per block of a mask that represents longer rows."""

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, int | None], jax.Array]


def make_attention(name: str, mesh: Mesh) -> Attention:
    """The implementation that `trainer.attention` names.

    `auto` is splash on TPUs wherever head width and T allow it; else einsum for rows whose scores are small, and
    chunked for longer ones.

    Raises:
      UserError: splash is requested on a machine that cannot run it.
    """
    platform = mesh.devices.flat[0].platform
    if name == "splash" and platform not in ("tpu", "cpu"):
        raise UserError(f"trainer.attention=splash: a TPU kernel, but this is {platform}; use trainer.attention=auto")
    parts = token_parts(mesh)
    whole_rows = {"einsum": einsum_attention, "chunked": chunked_attention}.get(name, _by_length)
    products = whole_rows if parts == 1 else partial(blockwise_attention, mesh=mesh)
    if name in ("einsum", "chunked") or (name == "auto" and platform != "tpu"):
        return products
    kernel = partial(splash_attention, mesh=mesh, interpret=platform == "cpu")
    multiple = kernel_multiple(parts)

    def where_it_fits(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None
    ) -> jax.Array:
        fits = not (q.shape[1] % multiple or q.shape[3] % LANES)
        return (kernel if fits else products)(q, k, v, segment_ids, window)

    return kernel if name == "splash" else where_it_fits


def _by_length(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None) -> jax.Array:
    """As both that it chooses from."""
    attend = einsum_attention if q.shape[1] <= EINSUM_TOKENS else chunked_attention
    return attend(q, k, v, segment_ids, window)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    *,
    mesh: Mesh,
    interpret: bool = False,
) -> jax.Array:
    """Like `attention.einsum_attention`, with the TPU kernel; heads are split over `tp`, rows over `dp` and `fsdp`,
    tokens over `cp`.

    `interpret` runs the kernel in plain Python on a CPU (for tests).
    """
    t, heads = q.shape[1:3]
    tp, parts = mesh.shape[TP], token_parts(mesh)
    head_axis = TP if heads % tp == 0 else None
    kv_axis = head_axis if k.shape[2] % tp == 0 else None
    split = CP if parts > 1 else None
    grid = _grid(t, parts, window)
    kernel = _kernel(grid, heads, tp if head_axis else 1, parts, interpret)
    exchanged = grid.exchanged is not None
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(head_axis, CP if exchanged else None)))
    q_spec, kv_spec = P(ROWS, head_axis, split, None), P(ROWS, kv_axis, split, None)

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(kernel_spec, q_spec, kv_spec, kv_spec, P(ROWS, split)), out_specs=q_spec,
        check_vma=False,
    )  # fmt: skip
    def attend(kernel, q, k, v, segments):
        def row(of_row):
            q, k, v, *segments = of_row
            of_q, of_kv = segments[0], segments[-1]
            return _without_foreign_blocks(kernel, of_q, of_kv, t)(q, k, v, splash.SegmentIds(of_q, of_kv))

        rows = (q, k, v, segments) if split is None else _brought(q, k, v, segments, window, grid.halo)
        out = row(jax.tree.map(lambda a: a[0], rows))[None] if len(q) == 1 else jax.lax.map(row, rows)
        return exchange(out, axis=2, back=True) if exchanged else out

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N, T, H]
    with jax.named_scope(scope(window)):
        return attend(kernel, q, k, v, segment_ids).swapaxes(1, 2)


class _BlockGrid(NamedTuple):
    """The blocks that a kernel visits."""

    mask: masks.LocalMask | masks.CausalMask
    blocks: splash.BlockSizes
    halo: int = 0
    """Number of keys that a chip receives before its own."""
    exchanged: np.ndarray | None = None
    """int32 [T]: positions of the queries, chip by chip, if each chip has its own tables of blocks to visit. `mask`
    then has as many blocks as the row, but of `FEW` tokens.
    """


def _grid(length: int, parts: int, window: int | None) -> _BlockGrid:
    """The grid for rows of `length` tokens, split over `parts` chips."""
    own = length // parts
    if window is not None:
        blocks = _blocks(own)
        halo = -(-(window - 1) // blocks.block_kv) * blocks.block_kv if parts > 1 else 0
        return _BlockGrid(masks.LocalMask((own, halo + own), (window - 1, 0), offset=halo), blocks, halo)
    if parts == 1:
        return _BlockGrid(masks.CausalMask((length, length)), _blocks(length))
    blocks = _blocks(own // 2)
    few = length // blocks.block_q * FEW
    mask = masks.CausalMask((few, few))
    mask.q_sequence = exchanged_places(few, parts)
    return _BlockGrid(mask, blocks, exchanged=exchanged_places(length, parts))


def _kernel(
    grid: _BlockGrid, heads: int, head_shards: int, parts: int, interpret: bool
) -> splash.SplashAttentionKernel:
    whole_rows = grid.exchanged is None
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([grid.mask] * heads),
        block_sizes=grid.blocks if whole_rows else _sizes(FEW),
        head_shards=head_shards,
        q_seq_shards=1 if whole_rows else parts,
        residual_checkpoint_name=CONTEXT,
        interpret=interpret,
    )
    if whole_rows:
        return kernel
    # A block is above, on or below the diagonal whatever its size, and enumerating all pairs of 131,072 tokens takes a
    # minute.
    places = jnp.array(grid.exchanged)
    tables = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    of_row = (info._replace(q_sequence=places) for info in tables if info is not None)
    return splash.SplashAttentionKernel(*of_row, **(kernel.kwargs | {"block_sizes": grid.blocks}))


def _brought(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int | None, halo: int
) -> tuple[jax.Array, ...]:
    """Queries [B, N, S, H], keys and values [B, K, T or halo + S, H], and the segments of both, on one chip."""
    if window is None:
        return exchange(q, 2), whole(k, 2), whole(v, 2), exchange(segments, 1), whole(segments, 1)
    return q, with_halo(k, halo, 2), with_halo(v, halo, 2), segments, segments_with_halo(segments, halo)


def scope(window: int | None) -> str:
    """Name in the compiled program of the kernels of a sliding (window in tokens) or global layer."""
    return "attend_global" if window is None else f"attend_window_{window}"


def _without_foreign_blocks(
    kernel: splash.SplashAttentionKernel, of_q: jax.Array, of_kv: jax.Array, length: int
) -> splash.SplashAttentionKernel:
    """The kernel without the blocks that contain no pair of tokens of the same segment.

    `of_q` and `of_kv` [S]: segments of queries and keys, of one row of `length` tokens.

    The mask is static and its tables name the blocks to visit; a zero in `block_mask` makes the kernel skip one.
    Segments increase along a row and padding (0) ends it, so two blocks share a segment exactly if their ranges
    overlap.
    """
    rising_q = jnp.where(of_q == 0, length + 1, of_q)
    rising_kv = rising_q if of_kv is of_q else jnp.where(of_kv == 0, length + 1, of_kv)

    def visited(info: masks_info.MaskInfo | None, block_q: int, block_kv: int, by_kv: bool):
        if info is None or info.data_next is None or info.block_mask is None:
            return info
        if info.data_next.shape[-1] * info.data_next.shape[-2] == 1:
            return info
        first_q, last_q = (ends(rising_q.reshape(-1, block_q), axis=1) for ends in (jnp.min, jnp.max))
        first_kv, last_kv = (ends(rising_kv.reshape(-1, block_kv), axis=1) for ends in (jnp.min, jnp.max))
        other = jnp.asarray(info.data_next, jnp.int32)  # [1 or heads, lines, columns]: the block on the side that moves
        if by_kv:
            q, kv = other, jax.lax.broadcasted_iota(jnp.int32, other.shape, 2)
        else:
            q, kv = jax.lax.broadcasted_iota(jnp.int32, other.shape, 1), other
        meet = (first_q[q] <= last_kv[kv]) & (first_kv[kv] <= last_q[q])
        return info._replace(block_mask=jnp.where(meet, info.block_mask, 0).astype(info.block_mask.dtype))

    sizes = kernel.kwargs["block_sizes"]
    return splash.SplashAttentionKernel(
        visited(kernel.fwd_mask_info, sizes.block_q, sizes.block_kv, by_kv=False),
        visited(kernel.dq_mask_info, sizes.block_q_dq, sizes.block_kv_dq, by_kv=False),
        visited(kernel.dkv_mask_info, sizes.block_q_dkv, sizes.block_kv_dkv, by_kv=True),
        **kernel.kwargs,
    )


def kernel_multiple(parts: int) -> int:
    """The number that T must be a multiple of for the kernel, if rows are split over `parts` chips (in two
    parts each).
    """
    return LANES if parts == 1 else 2 * LANES * parts


def _blocks(length: int) -> splash.BlockSizes:
    """Runs the backward pass in two kernels, one for dq and one for dk and dv.

    A single kernel would save two products of seven, but would write a dq for every block of keys, in sliding layers
    too, [T / block, N, T, H]: its memory grows with the square of T, and summing it takes longer than the two products.
    """
    return _sizes(next(b for b in (BLOCK, 384, 256, LANES) if length % b == 0))


def _sizes(block: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
