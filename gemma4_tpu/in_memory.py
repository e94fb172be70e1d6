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
from gemma4_tpu.config.machines import HardwareConfig, MeshConfig
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
"""A user's message, or a conversation of `{"role": …, "content": …}` turns."""
Text = str | Sequence[int]
"""Text, which is tokenised with a leading BOS token, or token ids, which are used unchanged."""


@dataclass(frozen=True)
class Gemma4:
    """A model in memory: base weights and, for a run, what it trained. Created by `load`.

    The model is sharded over all devices of this process. Methods return NumPy arrays on the host, one per input.

    For example::

        model = Gemma4.load("outputs/train/<run>")
        print(model.generate("What is a flip-flop?", max_new_tokens=64))
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
        """Loads anything that commands accept as `run=` or `model.path=`.

        Args:
          source: a run folder, or a Hugging Face checkpoint, local or gs://; `embedded:tiny`, `random:SEED`.
          checkpoint: for a run: `latest`, `best` (lowest held-out loss) or the number of an update.
          adapters: for a run; False loads its base without what it trained.
          compute_dtype: `float32`, `bfloat16`, or `auto` (float32 on CPUs, else bfloat16).
          mesh: sizes of the mesh axes; None: the largest legal tp, the remaining devices on fsdp.
          model: the architecture by name; only random weights need it.
          pictures: for a checkpoint: also load what prompts with pictures need (E2B, E4B). A run does if it was trained
            on pictures.

        Raises:
          UserError: `source` holds neither a run nor a checkpoint, or its parts do not fit together.
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
        """Sizes and layer types of the model."""
        return self.weights.model.arch

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, seed: int = 0, batch_size: int = 64, tools: Sequence[Any] = (), whole: bool = False,
    ) -> list[str]:  # fmt: skip
        """Answers each prompt, rendered with the checkpoint's chat template.

        Args:
          prompts: one or several; a conversation gets its next answer. User turns can contain pictures, as in rows:
            `"content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]`.
          max_new_tokens: maximal length of an answer, in tokens; longer ones are cut off.
          temperature: 0 takes the most likely token each time.
          top_p: draw from the smallest set of tokens whose probabilities add up to at least this.
          seed: with a prompt's position in the list, determines its draws, whatever else is in the batch.
          batch_size: prompts per decoding step.
          tools: functions that the model can call, as JSON schemas.
          whole: keep thoughts and control tokens, so that calls can be parsed (`data.calls.read_call`).

        Raises:
          UserError: a conversation is malformed, or the template refuses it.

        Returns:
          One text per prompt, in order, without thoughts and control tokens unless `whole`.
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
        """Logits of the next token after each token: [T, V] float32 per text, 1 MB per token for the released sizes.

        Args:
          texts: one or several texts or lists of token ids.
        """
        return self._rows(texts, _logits)

    def embed(self, texts: Text | Sequence[Text]) -> list[np.ndarray]:
        """Final hidden states, normalised: [T, D] float32 per text.

        Args:
          texts: one or several texts or lists of token ids.
        """
        return self._rows(texts, _hidden)

    def token_ids(self, text: Text) -> list[int]:
        """The token ids that `logits` and `embed` use for a text, with a leading BOS token."""
        return list(self.tokenizer(text)["input_ids"]) if isinstance(text, str) else list(text)

    def _rows(self, texts: Text | Sequence[Text], forward: Callable[..., jax.Array]) -> list[np.ndarray]:
        """Runs all texts as one batch, one row each, padded at the end."""
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
    """A list of prompts or texts; a single one becomes a list of one."""
    alone = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], dict | int | np.integer))
    return [given] if alone else list(given)
