"""Answers a few held-out prompts while a run trains, to show what the loss does not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma4_tpu.config.schema import TrainerConfig
from gemma4_tpu.data.examples import Examples
from gemma4_tpu.data.picture_cache import Shown
from gemma4_tpu.evals.generate import checkpoint_stop_ids, on_mesh, padded_width
from gemma4_tpu.models.base import Base
from gemma4_tpu.models.decode import Sampling, generate
from gemma4_tpu.models.sharding import row_places
from gemma4_tpu.tracking.metrics import MetricsFile
from gemma4_tpu.tracking.tracker import Tracker
from gemma4_tpu.training.setup import Setup

log = logging.getLogger(__name__)

FILE = "heldout_samples.jsonl"
COLUMNS = ("prompt", "answer", "reference", "finish")


class HeldoutAnswers:
    """Greedy answers to the first `trainer.sample_prompts` held-out examples, in place of each one's last answer.

    Rows of `heldout_samples.jsonl`: update, prompt, answer, reference, finish (`stop` or `length`).
    """

    def __init__(
        self, examples: Examples | None, base: Base, tokenizer: Any, trainer: TrainerConfig, folder: Path,
        resume_from: int | None, *, write: bool, shown: Shown | None = None,
    ):  # fmt: skip
        """Args:
        examples: the held-out examples; None if there are none.
        base: names the tokens that end an answer.
        tokenizer: the base's.
        trainer: number of prompts and maximum length of answers.
        folder: the run folder.
        resume_from: update from which the run resumes; later rows are dropped.
        write: False on every process but the first.
        shown: features of the examples' pictures.
        """
        count = min(trainer.sample_prompts, len(examples) if examples else 0)
        if count and jax.process_count() > 1:
            log.warning("trainer.sample_prompts=%d: not supported with several processes; no samples are drawn", count)
            count = 0
        self._trainer, self._tokenizer = trainer, tokenizer
        # Of a pair, the chosen side, which comes first.
        self._pairs = [split(*examples.sequences(i)[0]) for i in range(count)] if examples and count else []
        self._shown = shown if examples is not None and examples.pictures is not None else None
        self._keys = examples.pictures[:count] if self._shown and examples and examples.pictures else ()
        self._stop_ids = checkpoint_stop_ids(base, tokenizer) if count else ()
        self._rows = MetricsFile(folder / FILE, after_update=resume_from, write=write) if count else None

    def __call__(self, setup: Setup, trained: Any, update: int, tracker: Tracker) -> None:
        """Answers with the values after `update`."""
        if self._rows is None:
            return
        rows = [(*row, finish) for row, finish in self._answers(setup, trained)]
        for row in rows:
            self._rows.log(dict(zip(COLUMNS, row, strict=True)), update)
        tracker.table("heldout_samples", COLUMNS, rows, update)

    def close(self) -> None:
        """Closes the file of answers, if there is one."""
        if self._rows is not None:
            self._rows.close()

    def _answers(self, setup: Setup, trained: Any) -> list[tuple[tuple[str, str, str], str]]:
        """((prompt, answer, reference), finish) of each prompt."""
        padding = -len(self._pairs) % row_places(setup.mesh)
        prompts = [prompt for prompt, _ in self._pairs] + [self._pairs[-1][0]] * padding
        width = padded_width(prompts)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
        features = None
        if self._shown is not None:
            keys = [*self._keys, *[self._keys[-1]] * padding]
            features = on_mesh(self._shown.of_rows(tokens, keys), setup.mesh)
        made = generate(
            setup.step.model, *setup.step.weights(trained, setup.base), *_on(setup.mesh, tokens, prompts),
            max_new_tokens=self._trainer.sample_tokens, sampling=Sampling(temperature=0), stop_ids=self._stop_ids,
            features=features,
        )  # fmt: skip
        out, counts, stopped = (np.asarray(x) for x in made)
        answers = []
        for row, (prompt, reference) in enumerate(self._pairs):
            texts = [prompt, out[row, : counts[row]], reference]
            finish = "stop" if stopped[row] else "length"
            answers.append((tuple(self._tokenizer.batch_decode(texts, clean_up_tokenization_spaces=False)), finish))
        return answers


def split(ids: np.ndarray, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, reference): the last run of target tokens, and everything before it."""
    last = int(np.flatnonzero(flags)[-1])
    before = np.flatnonzero(~flags[: last + 1])
    start = int(before[-1]) + 1 if len(before) else 1
    return ids[:start], ids[start : last + 1]


def _on(mesh: Mesh, tokens: np.ndarray, prompts: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    return tuple(jax.device_put(jnp.asarray(x), rows) for x in (tokens, lengths, np.zeros(len(prompts), np.uint32)))
