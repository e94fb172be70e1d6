"""What the forward pass keeps for the backward pass, from most memory to most arithmetic.

Frozen weights need no inputs of their products in the backward pass, so `products` keeps only what a matrix product
made and what norms, activations and adapters read again: its backward pass repeats elementwise work alone.
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
_ALWAYS = ("routing",)  # small integers that take a sort to find again
_KEPT: dict[str, tuple[str, ...]] = {
    "products": (*_ALWAYS, *_ATTENTION, *_MLP),
    "attention": (*_ALWAYS, *_ATTENTION),
    "decoder": _ALWAYS,
}


def keep(x: jax.Array, name: str, apart: int = 0) -> jax.Array:
    """Marks an array that a policy may keep.

    What a loop keeps is collected in arrays that `lax.scan` begins with zeros, of which the TPU compiler writes none if
    the loop fills them all. If another loop has arrays of the same shape, both begin with the same zeros, and it writes
    them (E4B, two loops of three rounds: 68 of 382 ms). So loops of as many rounds keep arrays of other shapes.

    Args:
      x: the array.
      name: by which policies know it.
      apart: dims of one that it has in front while it is kept.
    """
    return _without(checkpoint_name(_with(x, apart), name), apart)


def _with(x: jax.Array, dims: int) -> jax.Array:
    """With so many dims of one in front."""
    return jnp.expand_dims(x, tuple(range(dims)))


def _without(x: jax.Array, dims: int) -> jax.Array:
    return jnp.squeeze(x, tuple(range(dims)))


def rematerialised(run: Callable, policy: str, *, in_loop: bool, apart: int = 0) -> Callable:
    """`run` (one decoder layer) under the policy that `trainer.remat` names; its inputs are always kept.

    Args:
      run: a function of x and other arrays.
      policy: `none` keeps everything, `products` every matrix product, `attention` attention's products only (the MLP
        runs again), `decoder` nothing.
      in_loop: the layer runs inside `lax.scan`, where XLA cannot undo the rematerialisation.
      apart: see `keep`.
    """
    if policy == "none":
        return run
    kept = jax.checkpoint_policies.save_only_these_names(*_KEPT[policy])
    # In a loop nothing can be undone, but what runs again of all layers of a group would be ready at once, and kept
    # until it is used: the barrier has each layer wait for the gradients behind it. Elementwise work fuses instead.
    again = jax.checkpoint(
        lambda x, *rest: run(_without(x, apart), *rest), prevent_cse=policy != "products" or not in_loop, policy=kept
    )
    return lambda x, *rest: again(_with(x, apart), *rest)
