"""A digest of values on the devices: identifies the policy that a sample was drawn from."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digest(values: Any) -> str:
    """16 hex digits that distinguish a tree of arrays from any other, however it is sharded.

    Every bit counts, in its place: sums modulo 2³² over all values, which are the same in any order. Only these sums
    leave the devices.
    """
    return hashlib.sha256(np.asarray(_sums(values)).tobytes()).hexdigest()[:16]


@jax.jit
def _sums(values: Any) -> jax.Array:
    """uint32 [leaves, 2]."""
    return jnp.stack([_of(leaf) for leaf in jax.tree.leaves(values)])


def _of(array: jax.Array) -> jax.Array:
    width = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)
    # Counted along each dim: a flattened array would be gathered on every device.
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D) ^ place * jnp.uint32(0x9E3779B9)
    mixed = (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
    return jnp.stack([jnp.sum(bits * (2 * place + 1)), jnp.sum(mixed ^ (mixed >> 15))])
