"""What the forward pass keeps for the backward pass, from most memory to most arithmetic.

Frozen weights need no inputs of their products in the backward pass, so `products` keeps only what a matrix product
made and what norms, activations and adapters read again: its backward pass repeats elementwise work alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
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

keep = checkpoint_name
"""`keep(x, name)` marks an array that a policy may keep."""


def rematerialised(run: Callable, policy: str, *, in_loop: bool) -> Callable:
    """`run` (one decoder layer) under the policy that `trainer.remat` names; its inputs are always kept.

    Args:
      run: a function of arrays.
      policy: `none` keeps everything, `products` every matrix product, `attention` attention's products only (the MLP
        runs again), `decoder` nothing.
      in_loop: the layer runs inside `lax.scan`, where XLA cannot undo the rematerialisation.
    """
    if policy == "none":
        return run
    kept = jax.checkpoint_policies.save_only_these_names(*_KEPT[policy])
    # In a loop nothing can be undone, but what runs again of all layers of a group would be ready at once, and kept
    # until it is used: the barrier has each layer wait for the gradients behind it. Elementwise work fuses instead.
    return jax.checkpoint(run, prevent_cse=policy != "products" or not in_loop, policy=kept)
