"""Generates text with a KV cache over the layers that training uses: many sequences per step, static shapes.

Tunix's sampler is not used: in 0.1.7 it draws a whole batch from one seed, so that a sample depends on its neighbours;
its mixture-of-experts router is wrong (`tunix_bridge.py`); and it supports neither stacked layers nor our adapters.

Rows are padded on the left, so that all of them are at the same position in every step. Sliding layers keep only the
last `window` keys and values, in a ring: position t is in slot t mod C. Dims as in `gemma4.py`, and P positions of the
prompt, C slots of a cache, S recent tokens, which the cache does not hold yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_tpu.models.attention import MASKED
from gemma4_tpu.models.gemma4 import KV, Layer, Model, Params, Visit, decoder_layer, logits, through_layers

Cache = list[list[KV | None]]
"""Per stage and layer of its group: keys and values [R, B, K, C, H]; None for KV-shared layers. Heads come before slots
because products with a query read them in this order; in any other, the compiler copies the whole cache.
"""


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities add up to at least this."""


class Generated(NamedTuple):
    """The result of a batch."""

    tokens: jax.Array
    """[B, N]; 0 after the end of a sequence."""
    counts: jax.Array
    """[B] tokens generated, including the one that ended the sequence."""
    stopped: jax.Array
    """[B] False if cut off after N tokens."""


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling", "stop_ids"))
def generate(
    model: Model,
    params: Params,
    lora: Params | None,
    tokens: jax.Array,
    lengths: jax.Array,
    seeds: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    features: jax.Array | None = None,
) -> Generated:
    """Continues each row until one of `stop_ids` or for `max_new_tokens`. Compiles once per shape of `tokens`.

    Args:
      model: architecture and settings; adapters act without dropout.
      params: base weights as laid out by `Layout`.
      lora: adapters; None uses the base model alone.
      tokens: [B, P] int32 prompts, padded on the left.
      lengths: [B] int32, real tokens of each prompt; at least 1.
      seeds: [B] uint32; a row's draws depend only on its own seed and logits, whatever else is in the batch.
      max_new_tokens: N.
      sampling: how tokens are drawn.
      stop_ids: a tuple.
      features: [B, P, I] of the prompts' pictures, as for `hidden_states`.
    """
    model = replace(model, remat="none", lora_dropout=0.0)
    b, p = tokens.shape
    first = p - lengths  # [B] position of each row's first real token
    places = jnp.arange(p)[None, :]
    segments = (places >= first[:, None]).astype(jnp.int32)
    forward = partial(through_layers, model, params, lora)
    hidden, kvs = forward(tokens, segments, jnp.maximum(places - first[:, None], 0), decoding(None), features=features)
    cache = jax.tree.map(
        partial(_to_cache, total=p + max_new_tokens, window=model.arch.sliding_window), kvs, is_global(model, kvs)
    )
    recent = no_recent(cache, 1)
    keys = jax.vmap(jax.random.key)(seeds)
    stops = jnp.asarray(stop_ids, jnp.int32)

    def going_on(carry: Any) -> jax.Array:
        i, _, done, *_ = carry
        return (i < max_new_tokens) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        i, scores, done, counts, out, cache = carry
        token = jnp.where(done, 0, sample(scores, keys, i, sampling))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        counts = counts + ~done
        done = done | jnp.isin(token, stops)
        place = p + i
        positions = (place - first)[:, None]
        visit, past = decoding(DecodingPlace(place, first, 0)), jax.tree.map(Past, cache, recent)
        hidden, kvs = forward(token[:, None], jnp.ones((b, 1), jnp.int32), positions, visit, beside=past)
        cache = jax.tree.map(partial(_put, place=place), cache, kvs)
        return i + 1, logits(model, params, hidden)[:, 0], done, counts, out, cache

    scores = logits(model, params, hidden[:, -1:])[:, 0]
    nothing = jnp.zeros((b, max_new_tokens), jnp.int32)
    start = (jnp.int32(0), scores, jnp.zeros(b, bool), jnp.zeros(b, jnp.int32), nothing, cache)
    _, _, done, counts, out, _ = jax.lax.while_loop(going_on, step, start)
    return Generated(out, counts, done)


def sample(scores: jax.Array, keys: jax.Array, index: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws the next token of each row, [B] int32.

    Args:
      scores: [B, V] float32 logits.
      keys: [B] keys, one per row.
      index: of the token in its sequence, one for all rows or [B]; the draw depends on it and the key.
      sampling: temperature and top_p.
    """
    if sampling.temperature == 0:
        return scores.argmax(-1).astype(jnp.int32)
    return draw(shaped(scores, sampling), keys, index)


def shaped(scores: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] of exactly the distribution that tokens are drawn from, at a temperature above 0."""
    scores = scores / sampling.temperature
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(scores, axis=-1)
        ranked = jnp.sort(probabilities, axis=-1, descending=True)
        before = jnp.cumsum(ranked, axis=-1) - ranked  # total probability of the more likely tokens
        least = jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(probabilities >= least, scores, MASKED)
    return scores


def draw(scores: jax.Array, keys: jax.Array, index: jax.Array) -> jax.Array:
    """Draws a token from each row's distribution with logits `scores`; see `sample`."""
    of_row = jax.vmap(lambda key, i, row: jax.random.categorical(jax.random.fold_in(key, i), row))
    return of_row(keys, jnp.broadcast_to(index, keys.shape), scores).astype(jnp.int32)


class DecodingPlace(NamedTuple):
    """The position of a decoding step."""

    place: jax.Array
    """Position of the new token: one for all rows, or [B]."""
    first: jax.Array
    """[B] position of each row's first real token."""
    recent: jax.Array | int
    """Index of the new token among the recent ones, which are the positions up to `place`."""


class Past(NamedTuple):
    """Keys or values that a new token attends to.

    Recent tokens stay apart for some steps, because a cache that changes in every step is copied in every step.
    """

    cache: jax.Array
    """[B, K, C, H], or [R, B, K, C, H] for all repeats of a stage."""
    recent: jax.Array
    """[B, K, S, H] or [R, B, K, S, H]."""


def no_recent(cache: Cache, size: int) -> Cache:
    """`Past.recent` after everything has been written to the cache, for `size` tokens."""
    return jax.tree.map(lambda x: jnp.zeros((*x.shape[:3], size, x.shape[4]), x.dtype), cache)


def decoding(at: DecodingPlace | None) -> Visit:
    """The visitor that decoding runs at each layer that has keys and values of its own.

    With `at` None, it processes a prompt, and collects keys and values [R, B, K, T, H]. Otherwise T = 1, the token also
    sees its layer's `Past` keys and values, and the visitor collects the recent ones with the new token's.
    """

    def visit(
        layer: Layer, x: jax.Array, per_layer_input: jax.Array | None, shared_kv: Any, past: Any
    ) -> tuple[jax.Array, Any, KV | None]:
        if at is None:
            x, kv = decoder_layer(layer, x, per_layer_input, shared_kv)
            return x, kv, None if layer.is_kv_shared else (_heads_first(kv[0]), _heads_first(kv[1]))
        extended = partial(_extended, at, None if layer.is_kv_shared else past)

        def attention(q: jax.Array, k: Any, v: Any, _segment_ids: jax.Array, _window: int | None) -> jax.Array:
            return _attend_past(at, q, *extended((k, v)))

        layer = replace(layer, model=replace(layer.model, attention=attention))
        x, kv = decoder_layer(layer, x, per_layer_input, shared_kv)
        keys, values = extended(kv)
        return x, (keys, values), None if layer.is_kv_shared else (keys.recent, values.recent)

    return visit


def _heads_first(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _extended(at: DecodingPlace, past: tuple[Past, Past] | None, kv: Any) -> tuple[Past, Past]:
    """Adds the new token's keys and values [B, 1, K, H] to a layer's past; those of a KV-shared layer (None) come from
    another layer, with that token.
    """
    if past is None:
        keys, values = kv
        return keys, values
    keys, values = (
        Past(old.cache, jax.lax.dynamic_update_slice_in_dim(old.recent, _heads_first(new), at.recent, axis=2))
        for old, new in zip(past, kv, strict=True)
    )
    return keys, values


def _attend_past(at: DecodingPlace, q: jax.Array, keys: Past, values: Past) -> jax.Array:
    """Attention of one new token per row, q [B, 1, N, H], to its past and itself → [B, 1, N, H]."""
    b, _, n, h = q.shape
    kv, slots = keys.cache.shape[1:3]
    queries = q.reshape(b, kv, n // kv, h)
    scores = [
        jnp.where(
            seen[:, None, None],
            jnp.einsum("bkgh,bksh->bkgs", queries, part, preferred_element_type=jnp.float32),
            MASKED,
        )
        for part, seen in zip(keys, _seen(at, slots, keys.recent.shape[2]), strict=True)
    ]
    top = jnp.maximum(*(part.max(axis=-1, keepdims=True) for part in scores))
    weights = [jnp.exp(part - top) for part in scores]
    cached, recent = (
        jnp.einsum("bkgs,bksh->bkgh", share.astype(q.dtype), part, preferred_element_type=jnp.float32)
        for share, part in zip(weights, values, strict=True)
    )
    of_cached, of_recent = (share.sum(axis=-1, keepdims=True) for share in weights)
    out = (cached + recent) / (of_cached + of_recent)
    return out.reshape(b, 1, n, h).astype(q.dtype)


def _seen(at: DecodingPlace, slots: int, recent: int) -> tuple[jax.Array, jax.Array]:
    """Which of a cache's slots and of the recent tokens a new token sees: [B, C] and [1, S].

    A ring is no longer than the window, so that the token sees C positions, including its own.
    """
    place = at.place[..., None]
    last = place - at.recent - 1  # position that was last written to the cache
    places = last - (last - jnp.arange(slots)) % slots  # [C] or [B, C]: the last position written to each slot
    cached = (places >= at.first[:, None]) & (places > place - slots)
    after = jnp.arange(recent)[None, :] - at.recent
    return cached, (after <= 0) & (after > -slots)


def _put(cache: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    """Writes a token's keys or values [R, B, K, 1, H] to [R, B, K, C, H] at a position that is the same in all rows."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new, place % cache.shape[3], axis=3)


def settle(cache: jax.Array, recent: jax.Array, places: jax.Array) -> jax.Array:
    """Writes recent keys or values [R, B, K, S, H] to a cache [R, B, K, C, H].

    Args:
      cache: each position in its slot.
      recent: of the S positions before `places`.
      places: [B] position of each row's next token.
    """
    slots, size = cache.shape[3], recent.shape[3]
    ago = (places[:, None] - 1 - jnp.arange(slots)) % slots  # [B, C]: steps since the last position of each slot
    taken = jnp.arange(size) == (size - 1 - ago)[..., None]  # [B, C, S]: the recent token that belongs to a slot
    # Products that pick a token are one pass over the cache; a scatter copies it into another layout and back.
    taken = jnp.broadcast_to(taken.astype(cache.dtype)[None, :, None], (*cache.shape[:4], size))
    picked = jnp.einsum("lbkcs,lbksh->lbkch", taken, recent, precision="highest")
    return jnp.where((ago < size)[None, :, None, :, None], picked, cache)


def is_global(model: Model, kvs: Cache) -> Any:
    """A tree like `kvs` that says for each array whether its layer is global."""
    return [
        [own and (model.arch.is_global(n),) * len(own) for n, own in zip(stage.layers[0], kvs_of_stage, strict=True)]
        for stage, kvs_of_stage in zip(model.layout.stages, kvs, strict=True)
    ]


def _to_cache(x: jax.Array, is_global: bool, *, total: int, window: int) -> jax.Array:
    """Turns a prompt's keys or values [R, B, K, P, H] into a cache [R, B, K, C, H], each position in its slot."""
    slots = total if is_global else min(window, total)
    last = x.shape[3] - 1
    places = last - (last - np.arange(slots)) % slots
    return jnp.where(places[:, None] >= 0, x[:, :, :, np.maximum(places, 0)], 0)
