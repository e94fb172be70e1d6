"""Generates text with a KV cache over the layers that training uses: many sequences per step, static shapes.

Tunix's sampler is not used: in 0.1.7 it draws a whole batch from one seed, so that a sample depends on its neighbours;
its mixture-of-experts router is wrong (`tunix_bridge.py`); and it supports neither stacked layers nor our adapters.

Rows are padded on the left, so that all of them are at the same position in every step. Sliding layers keep only the
last `window` keys and values, in a ring: position t is in slot t mod C. Dims as in `gemma4.py`, and P positions of the
prompt, C slots of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_tpu.models.attention import MASKED, attend
from gemma4_tpu.models.gemma4 import KV, Layer, Model, Params, Visit, decoder_layer, logits, through_layers

Cache = list[list[KV | None]]
"""Per stage and layer of its group: keys and values [R, B, C, K, H]; None for KV-shared layers."""


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
        visit = decoding(DecodingPlace(place, first))
        hidden, kvs = forward(token[:, None], jnp.ones((b, 1), jnp.int32), positions, visit, beside=cache)
        cache = jax.tree.map(partial(put, place=place), cache, kvs)
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


def decoding(at: DecodingPlace | None) -> Visit:
    """The visitor that decoding runs at each layer; it collects the new keys and values [R, B, T, K, H] of layers that
    have their own.

    With `at` None, it processes a prompt; otherwise T = 1, and the token also sees the layer's cache.
    """

    def visit(
        layer: Layer, x: jax.Array, per_layer_input: jax.Array | None, shared_kv: KV | None, cache: Any
    ) -> tuple[jax.Array, KV, KV | None]:
        if at is not None:
            layer = replace(layer, model=replace(layer.model, attention=partial(_attend_past, at, cache)))
        x, kv = decoder_layer(layer, x, per_layer_input, shared_kv)
        if layer.is_kv_shared:
            return x, kv, None
        return x, kv if at is None else _extend(cache, kv, at.place), kv

    return visit


def _attend_past(
    at: DecodingPlace,
    cache: KV | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    _segment_ids: jax.Array,
    _window: int | None,
) -> jax.Array:
    """Attention of one new token per row, q [B, 1, N, H], to the cache and to itself.

    `cache` is None for a KV-shared layer, whose k and v are the whole cache of the layer that it shares.
    """
    slots = (cache[0] if cache else k).shape[1]
    place = at.place[..., None]
    places = place - (place - jnp.arange(slots)) % slots  # [C] or [B, C]: the last position written to each slot
    seen = places >= at.first[:, None]  # a ring no longer than the window holds nothing older than the window
    if cache is None:
        return attend(q, k, v, seen[:, None, :])
    # The new token's slot holds a position that has left the window, or nothing.
    return _attend_beside(q, cache, (k, v), seen & (places != place))


def _attend_beside(q: jax.Array, cache: KV, new: KV, seen: jax.Array) -> jax.Array:
    """Attention of q [B, 1, N, H] to a cache [B, C, K, H] where `seen` [B, C], and to the new token [B, 1, K, H].

    The two stay separate because inserting the token first would copy the cache in each layer.
    """
    b, _, n, h = q.shape
    kv = new[0].shape[2]
    queries = q.reshape(b, kv, n // kv, h)
    scores = jnp.einsum("bkgh,bskh->bkgs", queries, cache[0], preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    own = jnp.einsum("bkgh,bkh->bkg", queries, new[0][:, 0], preferred_element_type=jnp.float32)[..., None]
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), own)
    weights, weight = jnp.exp(scores - top), jnp.exp(own - top)
    out = jnp.einsum("bkgs,bskh->bkgh", weights.astype(q.dtype), cache[1]) + weight * new[1][:, 0, :, None]
    out = out / (weights.sum(axis=-1, keepdims=True) + weight)
    return out.reshape(b, 1, n, h).astype(new[1].dtype)


def _extend(cache: KV, new: KV, place: jax.Array) -> KV:
    """Appends the keys and values of one token [B, 1, K, H] to [B, C, K, H]."""
    keys, values = (put(c[None], n[None], place)[0] for c, n in zip(cache, new, strict=True))
    return keys, values


def put(cache: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    """Writes a token's keys or values [R, B, 1, K, H] into [R, B, C, K, H] at `place`, one for all rows or [B]."""
    slot = place % cache.shape[2]
    if place.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=2)
    return cache.at[:, jnp.arange(cache.shape[1]), slot].set(new[:, :, 0])


def is_global(model: Model, kvs: Cache) -> Any:
    """A tree like `kvs` that says for each array whether its layer is global."""
    return [
        [own and (model.arch.is_global(n),) * len(own) for n, own in zip(stage.layers[0], kvs_of_stage, strict=True)]
        for stage, kvs_of_stage in zip(model.layout.stages, kvs, strict=True)
    ]


def _to_cache(x: jax.Array, is_global: bool, *, total: int, window: int) -> jax.Array:
    """Turns a prompt's keys or values [R, B, P, K, H] into a cache [R, B, C, K, H], each position in its slot."""
    slots = total if is_global else min(window, total)
    last = x.shape[2] - 1
    places = last - (last - np.arange(slots)) % slots
    return jnp.where(places[:, None, None] >= 0, x[:, :, np.maximum(places, 0)], 0)
