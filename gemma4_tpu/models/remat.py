"""What the forward pass keeps for the backward pass, from most memory to most arithmetic.

The products of frozen weights do not need their inputs in the backward pass, so `products` keeps only the outputs of
matrix products that norms, activations and adapters read again; its backward pass recomputes elementwise work only.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CONTEXT = "context"
"""Attention's output (and the kernel's softmax statistics), as each implementation marks them."""

_ATTENTION = ("query", "key_value", CONTEXT, "attended", "low")
_MLP = ("gate_up", "mlp_out", "experts_gate_up", "experts_out", "per_layer")
_ALWAYS = ("routing",)  # small integers that would take a sort to recompute
_KEPT: dict[str, tuple[str, ...]] = {
    "products": (*_ALWAYS, *_ATTENTION, *_MLP),
    "attention": (*_ALWAYS, *_ATTENTION),
    "decoder": _ALWAYS,
}


def keep(x: jax.Array, name: str, apart: int = 0) -> jax.Array:
    """Marks an array that a policy can keep.

    A loop collects what it keeps in arrays that `lax.scan` initialises with zeros, which the TPU compiler elides if the
    loop fills them completely. If another loop has arrays of the same shape, both start from the same zeros, which are
    then written (E4B, two loops of three rounds: 68 of 382 ms). So loops with the same number of rounds keep arrays of
    different shapes.

    Args:
      x: the array.
      name: by which policies refer to it.
      apart: number of leading dims of size one that it has while it is kept.
    """
    return _without(checkpoint_name(_with(x, apart), name), apart)


def _with(x: jax.Array, dims: int) -> jax.Array:
    """Returns x with `dims` leading dims of size one."""
    return jnp.expand_dims(x, tuple(range(dims)))


def _without(x: jax.Array, dims: int) -> jax.Array:
    return jnp.squeeze(x, tuple(range(dims)))


def rematerialised(run: Callable, policy: str, *, in_loop: bool, apart: int = 0) -> Callable:
    """`run` (one decoder layer) under the policy that `trainer.remat` names; its inputs are always kept.

    Args:
      run: a function of x and other arrays.
      policy: `none` keeps everything, `products` every matrix product, `attention` only attention's products (the MLP
        is recomputed), `decoder` nothing.
      in_loop: the layer runs inside `lax.scan`, where XLA cannot undo the rematerialisation.
      apart: see `keep`.
    """
    if policy == "none":
        return run
    kept = jax.checkpoint_policies.save_only_these_names(*_KEPT[policy])
    # XLA cannot undo it in a loop, but would recompute all layers of a group at once and keep the results until used:
    # the barrier makes each layer wait for the gradients of the one after it. Elementwise work is fused instead.
    again = jax.checkpoint(
        lambda x, *rest: run(_without(x, apart), *rest), prevent_cse=policy != "products" or not in_loop, policy=kept
    )
    return lambda x, *rest: again(_with(x, apart), *rest)
