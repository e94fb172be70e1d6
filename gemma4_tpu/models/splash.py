"""Attention by JAX's splash kernels on TPU: no [T, T] scores in memory, blocks outside mask and window are skipped.

Segment ids keep packed examples apart inside the kernel, and blocks that two examples don't share are skipped too;
KV-shared layers hand in the keys they share like any others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks_info
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma4_tpu.errors import UserError
from gemma4_tpu.models.attention import einsum_attention
from gemma4_tpu.models.remat import CONTEXT
from gemma4_tpu.models.sharding import ROWS, TP

LANES = 128
"""The kernels want head widths and lengths in multiples of a TPU register's lanes."""
BLOCK = 512
"""Tokens per block; 1024 does not compile for the backward pass at head width 512 (vector memory)."""

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, int | None], jax.Array]


def make_attention(name: str, mesh: Mesh) -> Attention:
    """The implementation that `trainer.attention` names.

    `auto` is splash on TPUs wherever head width and T allow it, else einsum.

    Raises:
      UserError: splash is asked for on a machine that cannot run it.
    """
    platform = mesh.devices.flat[0].platform
    if name == "splash" and platform not in ("tpu", "cpu"):
        raise UserError(f"trainer.attention=splash: a TPU kernel, but this is {platform}; give trainer.attention=auto")
    if name == "einsum" or (name == "auto" and platform != "tpu"):
        return einsum_attention
    kernel = partial(splash_attention, mesh=mesh, interpret=platform == "cpu")

    def where_it_fits(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, window: int | None
    ) -> jax.Array:
        fits = not (q.shape[1] % LANES or q.shape[3] % LANES)
        return (kernel if fits else einsum_attention)(q, k, v, segment_ids, window)

    return kernel if name == "splash" else where_it_fits


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
    """As `attention.einsum_attention`, by the TPU kernel; heads are split over `tp`, rows over `dp` and `fsdp`.

    `interpret` runs the kernel in plain Python on a CPU (tests).
    """
    t, heads = q.shape[1:3]
    tp = mesh.shape[TP]
    head_axis = TP if heads % tp == 0 else None
    kv_axis = head_axis if k.shape[2] % tp == 0 else None
    one = masks.CausalMask((t, t)) if window is None else masks.LocalMask((t, t), (window - 1, 0), offset=0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=_blocks(t),
        head_shards=tp if head_axis else 1,
        q_seq_shards=1,
        residual_checkpoint_name=CONTEXT,
        interpret=interpret,
    )
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(head_axis, None)))
    q_spec, kv_spec = P(ROWS, head_axis, None, None), P(ROWS, kv_axis, None, None)

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(kernel_spec, q_spec, kv_spec, kv_spec, P(ROWS, None)), out_specs=q_spec,
        check_vma=False,
    )  # fmt: skip
    def attend(kernel, q, k, v, segments):
        def row(of_row):
            q, k, v, segments = of_row
            return _without_foreign_blocks(kernel, segments)(q, k, v, splash.SegmentIds(segments, segments))

        rows = q, k, v, segments
        return row(jax.tree.map(lambda a: a[0], rows))[None] if len(q) == 1 else jax.lax.map(row, rows)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N, T, H]
    with jax.named_scope(scope(window)):
        return attend(kernel, q, k, v, segment_ids).swapaxes(1, 2)


def scope(window: int | None) -> str:
    """What the kernels of a sliding (window in tokens) or global layer are called in the compiled program."""
    return "attend_global" if window is None else f"attend_window_{window}"


def _without_foreign_blocks(kernel: splash.SplashAttentionKernel, segments: jax.Array) -> splash.SplashAttentionKernel:
    """The kernel with the blocks left out that hold no pair of tokens of one segment; segments [T] of one row.

    The mask is static and its tables name the blocks to visit; a zero in `block_mask` makes the kernel pass over one.
    Segments rise along a row and padding (0) ends it, so two blocks share one exactly if their ranges meet.
    """
    rising = jnp.where(segments == 0, len(segments) + 1, segments)

    def visited(info: masks_info.MaskInfo | None, block_q: int, block_kv: int, by_kv: bool):
        if info is None or info.data_next is None or info.block_mask is None:
            return info
        if info.data_next.shape[-1] * info.data_next.shape[-2] == 1:
            return info
        first_q, last_q = (ends(rising.reshape(-1, block_q), axis=1) for ends in (jnp.min, jnp.max))
        first_kv, last_kv = (ends(rising.reshape(-1, block_kv), axis=1) for ends in (jnp.min, jnp.max))
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


def _blocks(length: int) -> splash.BlockSizes:
    """The backward pass in two kernels, one for dq and one for dk and dv.

    One for all three would take two products of seven less, but leave a dq for every block of keys, sliding layers too,
    [T / block, N, T, H]: its memory grows with the square of T, and summing it takes longer than the two products.
    """
    block = next(b for b in (BLOCK, 384, 256, LANES) if length % b == 0)
    return splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
