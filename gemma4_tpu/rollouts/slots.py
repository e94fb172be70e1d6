"""Decodes in slots: each row of a static batch holds a sequence at its own position, and takes the next one when it
ends.

A prompt is read once, whatever the number of its samples. A position of a sequence is in the same slot of the cache
whenever and wherever it is decoded (position t in slot t mod C), and rows do not interact: a sample is determined, bit
for bit, by its weights, prompt, seed and these static shapes, and by nothing in other rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma4_tpu.models.decode import (
    Cache,
    DecodingPlace,
    Past,
    Sampling,
    decoding,
    draw,
    is_global,
    no_recent,
    settle,
    shaped,
)
from gemma4_tpu.models.gemma4 import Model, logits, through_layers
from gemma4_tpu.models.sharding import constrain, whole
from gemma4_tpu.step.train_step import Step


class Prompts(NamedTuple):
    """Q prompts that have been read."""

    kvs: Cache
    """Keys and values [R, Q, K, P, H], each position in its slot; P: the part of a layer's cache that a prompt
    can use.
    """
    scores: jax.Array
    """[Q, V] float32 logits of the first token of an answer."""
    lengths: jax.Array
    """[Q] int32."""


class Slots(NamedTuple):
    """B sequences in progress."""

    cache: Cache
    """Keys and values [R, B, K, C, H]."""
    scores: jax.Array
    """[B, V] float32 logits of the next token."""
    places: jax.Array
    """[B] int32: position of the next token, counted from the start of its prompt."""
    drawn: jax.Array
    """[B] int32: tokens drawn so far."""
    keys: jax.Array
    """[B] keys of the samples."""


KV_DIMS, SCORE_DIMS = "LBNTH", "BV"
"""Dims of a cache's arrays and of scores, as `models.sharding` places them: rows over dp, KV heads and vocabulary over
tp. Pinned at every program's end, because the compiler might otherwise put a whole cache on every chip.
"""


def _pinned(model: Model, cache: Cache) -> Cache:
    return jax.tree.map(lambda x: constrain(x, KV_DIMS, model.mesh), cache)


def for_decoding(model: Model) -> Model:
    """The trained model without its training-only settings."""
    return replace(model, remat="none", lora_dropout=0.0)


def read(step: Step, trained: Any, base: Any, tokens: jax.Array, lengths: jax.Array) -> Prompts:
    """Reads prompts, [Q, P] int32 padded on the right, with [Q] `lengths` of at least 1."""
    model, (params, lora) = for_decoding(step.model), step.weights(trained, base)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (places < lengths[:, None]).astype(jnp.int32)
    hidden, kvs = through_layers(model, params, lora, tokens, segments, places, decoding(None))
    last = lengths - 1
    window = model.arch.sliding_window
    kvs = jax.tree.map(partial(_in_slots, last=last, window=window), kvs, is_global(model, kvs))
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # [Q, 1, D]
    scores = constrain(logits(model, params, hidden)[:, 0], SCORE_DIMS, model.mesh)
    return Prompts(_pinned(model, kvs), scores, lengths)


def _in_slots(x: jax.Array, is_global: bool, *, last: jax.Array, window: int) -> jax.Array:
    """A prompt's keys or values [R, Q, K, P, H], each position in its slot; `last` [Q] is the prompt's last
    position.
    """
    length = x.shape[3]
    if is_global or length <= window:
        return x
    places = last[:, None] - (last[:, None] - jnp.arange(window)) % window  # [Q, C]
    return jnp.take_along_axis(x, jnp.maximum(places, 0)[None, :, None, :, None], axis=3)


def empty(prompts: Prompts, slots: int, new_tokens: int, model: Model) -> Slots:
    """`slots` empty rows, with room for the longest prompt and `new_tokens`."""
    window = model.arch.sliding_window

    def rows(x: jax.Array, is_global: bool) -> jax.Array:
        r, _, k, p, h = x.shape
        total = p + new_tokens
        return jnp.zeros((r, slots, k, total if is_global else min(total, window), h), x.dtype)

    nothing = jnp.zeros(slots, jnp.int32)
    scores = constrain(jnp.zeros((slots, prompts.scores.shape[1]), jnp.float32), SCORE_DIMS, model.mesh)
    keys = jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32))
    cache = _pinned(model, jax.tree.map(rows, prompts.kvs, is_global(model, prompts.kvs)))
    return Slots(cache, scores, nothing, nothing, keys)


def admit(
    slots: Slots, prompts: Prompts, taken: jax.Array, which: jax.Array, seeds: jax.Array, *, model: Model
) -> Slots:  # fmt: skip
    """Starts new samples in the rows `taken` [B] (bool): of the prompts `which` [B], with `seeds` [B] uint32."""

    def replaced(old: jax.Array, of_prompts: jax.Array) -> jax.Array:
        own = of_prompts[which]
        return jnp.where(taken.reshape(-1, *[1] * (own.ndim - 1)), own, old)

    def filled(cache: jax.Array, kv: jax.Array) -> jax.Array:
        # Whatever an earlier sample left in other slots is after the new one's position, so nothing attends to it.
        part = jnp.where(taken[None, :, None, None, None], kv[:, which], cache[:, :, :, : kv.shape[3]])
        return jax.lax.dynamic_update_slice_in_dim(cache, part, 0, axis=3)

    return Slots(
        _pinned(model, jax.tree.map(filled, slots.cache, prompts.kvs)),
        replaced(slots.scores, prompts.scores),
        replaced(slots.places, prompts.lengths),
        jnp.where(taken, 0, slots.drawn),
        jnp.where(taken, jax.vmap(jax.random.key)(seeds), slots.keys),
    )


def advance(step: Step, trained: Any, base: Any, slots: Slots, *, tokens: int) -> tuple[Slots, jax.Array, jax.Array]:
    """Decodes the next `tokens` tokens K of every row, whether or not its sequence has ended, which the caller knows.

    Returns:
      The slots; tokens [B, K] int32; their log-probabilities [B, K] float32 in the distribution they were drawn from.
      The latter two are whole on every device.
    """
    model, (params, lora) = for_decoding(step.model), step.weights(trained, base)
    b = slots.places.shape[0]

    def one(carry: tuple[Any, ...], index: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        scores, places, drawn, recent = carry
        scores = shaped(scores, SAMPLING)
        token = draw(scores, slots.keys, drawn)
        chance = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), token[:, None], axis=-1)[:, 0]
        hidden, recent = through_layers(
            model, params, lora, token[:, None], jnp.ones((b, 1), jnp.int32), places[:, None],
            decoding(DecodingPlace(places, jnp.zeros_like(places), index)),
            beside=jax.tree.map(Past, slots.cache, recent),
        )  # fmt: skip
        after = constrain(logits(model, params, hidden)[:, 0], SCORE_DIMS, model.mesh)
        return (after, places + 1, drawn + 1, _pinned(model, recent)), (token, chance)

    start = slots.scores, slots.places, slots.drawn, _pinned(model, no_recent(slots.cache, tokens))
    (scores, places, count, recent), (drawn, chances) = jax.lax.scan(one, start, jnp.arange(tokens))
    cache = _pinned(model, jax.tree.map(partial(settle, places=places), slots.cache, recent))
    slots = Slots(cache, scores, places, count, slots.keys)
    return slots, whole(drawn.T, model.mesh), whole(chances.T, model.mesh)


SAMPLING = Sampling(temperature=1.0, top_p=1.0)
"""Fixed for roll-outs; no key changes it, so that samples come from the policy that the trainer differentiates."""
