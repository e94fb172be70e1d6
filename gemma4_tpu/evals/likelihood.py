"""Likelihoods of given answers: log-probabilities of the last tokens of each row, in one forward pass."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from gemma4_tpu.models.gemma4 import Model, Params, hidden_states
from gemma4_tpu.step.loss import Head, token_nll

LOGITS_TOKENS = 1024
"""Number of a batch's tokens whose logits exist at one time."""


@partial(jax.jit, static_argnames=("model", "most"))
def answer_logprobs(
    model: Model, params: Params, lora: Params | None, tokens: jax.Array, lengths: jax.Array, answers: jax.Array, *,
    most: int, features: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Log-probability of each row's answer given its prompt: float32 [B], in nats.

    Args:
      model: architecture and settings; adapters apply without dropout.
      params: base weights.
      lora: adapters, or None.
      tokens: [B, T] int32, prompt and answer, padded on the left.
      lengths: [B] int32, number of real tokens in each row.
      answers: [B] int32, number of tokens in its answer, from 1 to `most`.
      most: maximum length of an answer, less than T.
      features: [B, T, I], those of the pictures, as `hidden_states` takes them.
    """
    model = replace(model, remat="none", lora_dropout=0.0)
    b, t = tokens.shape
    places, first = jnp.arange(t)[None, :], (t - lengths)[:, None]
    segments, positions = (places >= first).astype(jnp.int32), jnp.maximum(places - first, 0)
    hidden = hidden_states(model, params, lora, tokens, segments, positions, features=features)
    hidden = hidden[:, -most - 1 : -1]  # [B, most, D]
    head = Head(model.arch.final_logit_softcap, max(1, LOGITS_TOKENS // b), mesh=model.mesh)
    nll = token_nll(hidden, params["embedder"]["input_embedding"], tokens[:, -most:], head)
    counted = jnp.arange(most)[None, :] >= most - answers[:, None]
    return -jnp.where(counted, nll, 0.0).sum(axis=-1)
