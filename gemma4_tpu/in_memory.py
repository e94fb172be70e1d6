"""`Gemma4`: a checkpoint or a trained run in memory, for notebooks and scripts. Starts JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma4_tpu.architectures import Architecture
from gemma4_tpu.config.schema import HardwareConfig, MeshConfig
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.data.chat import Message
from gemma4_tpu.data.seen import Sight
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.any_model import find_model
from gemma4_tpu.evals.generate import (
    InProcess,
    SampleRequest,
    Weights,
    checkpoint_stop_ids,
    on_mesh,
    padded_width,
    sample_seed,
)
from gemma4_tpu.models import sharding
from gemma4_tpu.models.base import Base
from gemma4_tpu.models.gemma4 import Model, Params, hidden_states, logits
from gemma4_tpu.training.meshes import whole_rows_problems
from gemma4_tpu.training.setup import start_mesh

Prompt = str | Sequence[Message]
"""What a user says, or a conversation of `{"role": …, "content": …}`."""
Text = str | Sequence[int]
"""Text, which gets the BOS token before it, or token ids as they are."""


@dataclass(frozen=True)
class Gemma4:
    """A model in memory: base weights and, of a run, what it trained. Made by `load`.

    It is on all devices of this process; results are NumPy arrays on the host, one for each row that was given.
    """

    weights: Weights
    base: Base
    tokenizer: Any
    thoughts: str
    """Policy for the prompt's thought channel, `drop` or `train`."""

    @classmethod
    def load(
        cls, source: str | Path, *, checkpoint: str = "latest", adapters: bool = True, compute_dtype: str = "auto",
        mesh: MeshConfig | None = None, model: str | None = None, pictures: bool = False,
    ) -> Gemma4:  # fmt: skip
        """Loads what commands take as `run=` or `model.path=`.

        Args:
          source: a run folder, or a Hugging Face checkpoint, local or gs://; `embedded:tiny`, `random:SEED`.
          checkpoint: of a run: `latest`, `best` (lowest held-out loss) or the number of an update.
          adapters: of a run: False leaves out what it trained.
          compute_dtype: `float32`, `bfloat16`, or `auto` (float32 on CPUs, else bfloat16).
          mesh: how devices are laid out; None: the largest legal tp, the rest fsdp.
          model: the architecture by name; only random weights need it.
          pictures: of a checkpoint: whether prompts may have some (E2B, E4B). A run reads them if it was trained to.

        Raises:
          UserError: nothing of the kind is there, or its parts don't fit together.
        """
        mesh = mesh or MeshConfig(tp=None)
        if problems := whole_rows_problems(mesh.cp, "a model in memory takes texts of any length"):
            raise UserError(problems[0])
        found = find_model(str(source), checkpoint=checkpoint, model=model, pictures=pictures)
        on = start_mesh(HardwareConfig(), mesh, found.base.arch)
        thoughts = found.trained.run.read_config().get("data", {}).get("thoughts", "drop") if found.trained else "drop"
        return cls(found.load(on, compute_dtype, adapters=adapters), found.base, found.tokenizer, thoughts)

    @property
    def architecture(self) -> Architecture:
        """Sizes and layer types."""
        return self.weights.model.arch

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, seed: int = 0, batch_size: int = 64, tools: Sequence[Any] = (), whole: bool = False,
    ) -> list[str]:  # fmt: skip
        """An answer to each prompt, rendered by the checkpoint's chat template.

        Args:
          prompts: one or several; of a conversation the next answer. Users' turns can hold pictures, as those of rows:
            `"content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]`.
          max_new_tokens: answers are cut off here.
          temperature: 0: the likeliest token each time.
          top_p: draw from the smallest set of tokens with this share of the probability.
          seed: a prompt's draws follow from it and the prompt's place in the list, whatever else is in a batch.
          batch_size: prompts in one decoding step.
          tools: functions that the model may call, as JSON schemas.
          whole: answers keep their thoughts and control tokens, so that calls can be read (`data.calls.read_call`).

        Raises:
          UserError: a malformed conversation, or one that the template refuses.
        """
        settings = EvalConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=batch_size
        )
        stops = checkpoint_stop_ids(self.base, self.tokenizer)
        sight = Sight(self.base)
        decoder = InProcess(self.weights, self.tokenizer, stops, settings, self.thoughts, {}, sight, whole)
        asked = [
            SampleRequest(f"{i}", 0, _messages(prompt), sample_seed(seed, f"{i}", 0), tuple(tools) or None)
            for i, prompt in enumerate(_several(prompts))
        ]
        return [s.completion for s in sorted(decoder.generate(asked), key=lambda sample: int(sample.problem))]

    def logits(self, texts: Text | Sequence[Text]) -> list[np.ndarray]:
        """Of the next token after each token: [T, V] float32 for each text. A large vocabulary takes 1 MB per token."""
        return self._rows(texts, _logits)

    def embed(self, texts: Text | Sequence[Text]) -> list[np.ndarray]:
        """Final hidden states, normalised: [T, D] float32 for each text."""
        return self._rows(texts, _hidden)

    def token_ids(self, text: Text) -> list[int]:
        """What `logits` and `embed` take a text as."""
        return list(self.tokenizer(text)["input_ids"]) if isinstance(text, str) else list(text)

    def _rows(self, texts: Text | Sequence[Text], forward: Callable[..., jax.Array]) -> list[np.ndarray]:
        """Runs all texts as one batch, each a row padded at its end."""
        ids = [self.token_ids(text) for text in _several(texts)]
        model = self.weights.model
        places = sharding.row_places(model.mesh) if model.mesh is not None else 1
        tokens = np.zeros((-(-len(ids) // places) * places, padded_width(ids)), np.int32)
        segments = np.zeros_like(tokens)
        for row, of_text in enumerate(ids):
            tokens[row, : len(of_text)], segments[row, : len(of_text)] = of_text, 1
        given = (on_mesh(x, model.mesh) for x in (tokens, segments))
        found = forward(model, self.weights.params, self.weights.lora, *given)
        return [np.asarray(found[row, : len(of_text)], np.float32) for row, of_text in enumerate(ids)]


@partial(jax.jit, static_argnames="model")
def _hidden(model: Model, params: Params, lora: Params | None, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T, D]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return hidden_states(model, params, lora, tokens, segments, positions)


@partial(jax.jit, static_argnames="model")
def _logits(model: Model, params: Params, lora: Params | None, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """[B, T, V]."""
    return logits(model, params, _hidden(model, params, lora, tokens, segments))


def _messages(prompt: Prompt) -> tuple[Message, ...]:
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)


def _several(given: Any) -> list[Any]:
    """A list of prompts or texts; one by itself is a list of one."""
    alone = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], dict | int | np.integer))
    return [given] if alone else list(given)
