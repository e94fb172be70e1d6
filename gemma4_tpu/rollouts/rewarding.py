"""Rewards: the value and the class of a sampled answer, from the judge, or from your own function or server."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from gemma4_tpu.config.rollouts import JUDGE, RolloutsConfig, is_address
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.reward import JudgeProcess
from gemma4_tpu.rollouts.policy_tasks import Task

TRUNCATED, NO_FENCE, PASSED, OTHER = "truncated", "no fence", "pass", "scored"
"""Classes of verdicts, in addition to the judge's and to those that functions and servers name."""
FENCE = "```"


@dataclass(frozen=True)
class Answer:
    """A sampled answer, as the reward receives it."""

    task: Task
    text: str
    """As a user would see it, without thoughts and control tokens."""
    stopped: bool
    """False: truncated."""

    def to_row(self) -> dict[str, Any]:
        """The dict for functions and servers."""
        task = self.task
        return {
            "problem": task.name, "prompt": task.prompt, "completion": self.text, "reference": task.reference,
            "stopped": self.stopped,
        }  # fmt: skip


@dataclass(frozen=True)
class Rewarded:
    """The value of an answer."""

    reward: float
    kind: str
    """Class of the verdict, for the certificate: drift between classes shows what is being learned."""
    detail: str = ""
    well_formed: bool = True
    """Whether it has the required form; a falling share shows that form drifts."""


class Reward(Protocol):
    """Rewards answers; called from one thread at a time."""

    def __call__(self, answers: Sequence[Answer]) -> list[Rewarded]:
        """A reward for each answer, in order. Raises: UserError: it cannot be determined."""


class ByJudge:
    """1 for an answer that passes its test bench, is complete, and opens with the fence; else 0.

    The judge finds code anywhere; a policy rewarded for that drifts into prose before the code. So form is part of the
    reward, and answers without it have their own class.
    """

    def __init__(self, judge: JudgeProcess):
        self._judge = judge

    def __call__(self, answers: Sequence[Answer]) -> list[Rewarded]:
        """See `Reward`."""
        rows = self._judge([(answer.task.name, answer.text) for answer in answers])
        return [self._one(answer, row) for answer, row in zip(answers, rows, strict=True)]

    def _one(self, answer: Answer, row: dict[str, Any]) -> Rewarded:
        fenced = answer.text.lstrip().startswith(FENCE)
        if not row["passed"]:
            return Rewarded(0.0, row["kind"], row["detail"], fenced)
        if not answer.stopped:
            return Rewarded(0.0, TRUNCATED, "passes, but was cut off before its end", fenced)
        if not fenced:
            return Rewarded(0.0, NO_FENCE, "passes, but does not open with a fence", fenced)
        return Rewarded(1.0, PASSED)


class ByFunction:
    """A Python function of a list of rows (`Answer.to_row`); returns a number, or (number, class), for each."""

    def __init__(self, name: str):
        """Imports the function.

        Args:
          name: `module:function`.

        Raises:
          UserError: there is no such function.
        """
        self._name, self._function = name, load_function(name)

    def __call__(self, answers: Sequence[Answer]) -> list[Rewarded]:
        """See `Reward`."""
        try:
            given = self._function([answer.to_row() for answer in answers])
        except (Exception, SystemExit) as error:  # whatever code of the user's may do
            *_, last = traceback.extract_tb(error.__traceback__)
            raise UserError(
                f"rollouts.reward={self._name}: raised {error!r} ({last.filename}, line {last.lineno}); verdicts so far"
                " are kept, and the same command resumes"
            ) from error
        if not isinstance(given, Sequence) or len(given) != len(answers):
            raise UserError(
                f"rollouts.reward={self._name}: gave {_shown(given)} for {len(answers)} answers; return a list with a"
                " number, or (number, class), for each"
            )
        return [_rewarded(one, f"rollouts.reward={self._name}") for one in given]


class ByEndpoint:
    """A server: POST {"samples": [row, …]} → {"verdicts": [{"score": number, "kind": class}, …]}, in this order.

    `gemma4_tpu.judge` uses the same protocol.
    """

    def __init__(self, url: str, timeout_seconds: float):
        self._url, self._client = url, httpx.Client(timeout=timeout_seconds)

    def __call__(self, answers: Sequence[Answer]) -> list[Rewarded]:
        """See `Reward`."""
        where = f"rollouts.reward={self._url}"
        try:
            response = self._client.post(self._url, json={"samples": [answer.to_row() for answer in answers]})
            response.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: no name of a host
            raise UserError(
                f"{where}: {str(error) or repr(error)}; verdicts so far are kept, and the same command resumes"
            ) from None
        try:
            rows = response.json()["verdicts"]
            given = [(row["score"], row.get("kind", OTHER), row.get("detail", "")) for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{where}: answered something other than {{"verdicts": [{{"score": …}}, …]}}: {_shown(response.text)}'
                f" ({error!r})"
            ) from None
        if len(given) != len(answers):
            raise UserError(f"{where}: {len(given)} verdicts for {len(answers)} samples")
        return [_rewarded(one, where) for one in given]


def open_reward(config: RolloutsConfig) -> AbstractContextManager[Reward | None]:
    """A context manager of the reward that `rollouts.reward` names, ready to use; None if it names none.

    Raises:
      UserError: there is no such function, or the judge does not start.
    """
    if config.reward is None:
        return nullcontext(None)
    if config.reward == JUDGE:
        return _JudgeHere(config)
    if is_address(config.reward):
        return nullcontext(ByEndpoint(config.reward, config.reward_timeout_seconds))
    return nullcontext(ByFunction(config.reward))


class _JudgeHere:
    """The judge's process, for as long as it is needed."""

    def __init__(self, config: RolloutsConfig):
        self._words = [f"eval.benchmark={config.benchmark}", f'eval.problems_path="{config.problems_path}"']

    def __enter__(self) -> Reward:
        self._judge = JudgeProcess(*self._words)
        return ByJudge(self._judge)

    def __exit__(self, *_: object) -> None:
        self._judge.close()


def load_function(name: str) -> Callable[[list[dict[str, Any]]], Any]:
    """The function `module:function`, with the module imported from the working folder or the path.

    Raises:
      UserError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever code of the user's may do
        raise UserError(
            f"rollouts.reward={name}: the module {module_name} can't be imported ({error!r}); use an importable"
            " module:function (see PYTHONPATH), a URL, or judge"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        there = ", ".join(sorted(n for n, f in vars(module).items() if inspect.isfunction(f))[:8])
        raise UserError(f"rollouts.reward={name}: {module_name} has no function {function_name!r} (it has {there})")
    return function


def _rewarded(given: Any, where: str) -> Rewarded:
    """A number, or (number, class) or (number, class, detail)."""
    parts = list(given) if isinstance(given, list | tuple) else [given]
    with contextlib.suppress(Exception):  # whatever converting a value of the user's may raise
        if math.isfinite(reward := float(parts[0])):
            kind, detail = (str(part) for part in (parts + [OTHER, ""][len(parts) - 1 :])[1:3])
            return Rewarded(reward, kind, detail)
    raise UserError(f"{where}: returned {_shown(given)} for an answer; return a finite number, or (number, class)")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}…"
