"""Prompts for the policy: those of training rows, or the problems of a benchmark."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma4_tpu.config.rollouts import JUDGE, RolloutsConfig
from gemma4_tpu.config.schema import DataConfig
from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.data.chat import ChatFormat
from gemma4_tpu.data.examples import Examples
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.benchmarks import SOURCES, load_problems
from gemma4_tpu.evals.generate import visible
from gemma4_tpu.evals.heldout import split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One prompt."""

    name: str
    """Name of the problem, or `file:row`; unique among tasks."""
    ids: np.ndarray
    """int32 [n]: the prompt as a server with the checkpoint's template sends it."""
    prompt: str
    """The same as text."""
    reference: str
    """The row's own answer, as a user would see it; for a problem, its reference design."""


def asked(
    config: RolloutsConfig, data: DataConfig, train: Examples, tokenizer: Any
) -> tuple[list[Task], list[Task]]:  # fmt: skip
    """(trained on, validated on): the prompts of a run, as far as they fit; see `set_aside`.

    Args:
      config: which prompts.
      data: thoughts.
      train: the training rows, whose prompts are asked where the reward brings no problems.
      tokenizer: the checkpoint's own.

    Raises:
      UserError: none, or too few.
    """
    if config.reward == JUDGE:
        tasks = of_problems(config, ChatFormat(tokenizer, data.thoughts))
    else:
        tasks = of_rows(train, tokenizer)
    return set_aside(that_fit(tasks, config.prompt_tokens), config.validation_prompts)


def of_rows(examples: Examples, tokenizer: Any) -> list[Task]:
    """The prompts of training rows: everything before a row's last answer, which is the reference."""
    pairs = [split(*examples.example(i)) for i in range(len(examples))]
    prompts, references = (
        tokenizer.batch_decode([pair[side] for pair in pairs], clean_up_tokenization_spaces=False) for side in (0, 1)
    )
    tasks: dict[str, Task] = {}
    for i, (ids, _) in enumerate(pairs):
        name = str(examples.origin(i))
        name = name if name not in tasks else f"{name}#{i}"  # several examples can come from one row
        tasks[name] = Task(name, ids, prompts[i], visible(references[i], tokenizer))
    return list(tasks.values())


def of_problems(config: RolloutsConfig, chat: ChatFormat) -> list[Task]:
    """The problems of a benchmark, rendered as an evaluation does. Raises: UserError: there are none, or they are
    damaged.
    """
    if config.benchmark not in SOURCES:
        raise UserError(f"rollouts.benchmark={config.benchmark}: not a choice (choices: {', '.join(SOURCES)})")
    problems = load_problems(EvalConfig(benchmark=config.benchmark, problems_path=config.problems_path))
    texts = [chat.render_prompt([{"role": "user", "content": problem.prompt}]) for problem in problems]
    encoded = chat.encode(texts)
    return [
        Task(problem.name, ids, text, problem.reference)
        for problem, ids, text in zip(problems, encoded, texts, strict=True)
    ]


def that_fit(tasks: Sequence[Task], prompt_tokens: int) -> list[Task]:
    """The tasks whose prompt is not too long; logs how many are.

    Raises:
      UserError: none is left.
    """
    fitting = [task for task in tasks if len(task.ids) <= prompt_tokens]
    longest = max((len(task.ids) for task in tasks), default=0)
    if dropped := len(tasks) - len(fitting):
        log.warning(
            "skipped %d of %d prompts that are longer than rollouts.prompt_tokens=%d (the longest has %d)",
            dropped, len(tasks), prompt_tokens, longest,
        )  # fmt: skip
    if not fitting:
        raise UserError(
            f"rollouts.prompt_tokens={prompt_tokens}: all {len(tasks)} prompts are longer; the longest has {longest}"
        )
    return fitting


def set_aside(tasks: Sequence[Task], wanted: int) -> tuple[list[Task], list[Task]]:
    """(trained on, validated on): `wanted` prompts by a hash of their tokens; equal ones are on one side.

    Raises:
      UserError: that leaves nothing to train on.
    """
    keys = [hashlib.sha256(task.ids.tobytes()).hexdigest() for task in tasks]
    chosen = sorted({*keys})[:wanted]
    rest = [task for task, key in zip(tasks, keys, strict=True) if key not in {*chosen}]
    if wanted and not rest:
        raise UserError(
            f"rollouts.validation_prompts={wanted}: there are {len({*keys})} different prompts, which leaves none to"
            " train on; give fewer"
        )
    of_key = dict(zip(reversed(keys), reversed(tasks), strict=True))
    return rest, [of_key[key] for key in chosen]
