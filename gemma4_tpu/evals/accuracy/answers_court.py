"""Questions from rows, judged by comparing answers; `matching.py` decides when an answer is correct."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gemma4_tpu.config.tasks import EvalConfig
from gemma4_tpu.evals.accuracy.matching import Matcher, unanswered, verdict
from gemma4_tpu.evals.accuracy.questions import Question, load_questions
from gemma4_tpu.evals.court import VERDICTS_FILE, Judged
from gemma4_tpu.evals.problems import Verdict, VerdictClass
from gemma4_tpu.evals.store import LENGTH, Key, Rows, Sample

EXAMPLES_SHOWN = 20
"""Incorrect answers shown in the report."""


class AnswersCourt:
    """See `Court`."""

    official = False

    def __init__(self, config: EvalConfig):
        """Raises: UserError: rows that can't be asked."""
        self._answers = config.answers
        self._matcher = Matcher(config.answers)
        self.problems: list[Question] = load_questions(config)
        self._by_name = {question.name: question for question in self.problems}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        """See `Court`."""
        told = json.dumps([[q.messages, q.answer, q.choices, q.tools] for q in self.problems], default=str)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """See `Court`."""
        answers = self._answers
        how = {"choose": answers.choose} if answers.choices else {"compare": answers.compare}
        return {**how, "extract": answers.extract}

    @property
    def categories(self) -> dict[str, str]:
        """See `Court`."""
        return {question.name: question.category for question in self.problems if question.category is not None}

    @property
    def told(self) -> dict[str, Any]:
        """See `Court`."""
        return {}

    def judge(self, samples: Sequence[Sample], folder: Path, *, again: bool) -> Judged:
        """See `Court`. Comparing is cheap, so verdicts are always recomputed."""
        path = folder / VERDICTS_FILE
        path.unlink(missing_ok=True)
        verdicts: dict[Key, Verdict] = {}
        examples: list[dict[str, str]] = []
        with Rows(path) as rows:
            for sample in samples:
                if (question := self._by_name.get(sample.problem)) is None:
                    continue
                found = verdicts[sample.key] = self._verdict(question, sample)
                rows.add_for(sample, found.to_row())
                if not found.passed and len(examples) < EXAMPLES_SHOWN:
                    examples.append({"problem": sample.problem, "kind": str(found.kind), "detail": found.detail})
        return Judged(verdicts, told={"answers": {**self.settings, "chance": self._chance, "examples": examples}})

    @property
    def _chance(self) -> float | None:
        """The chance level of accuracy; None if answers are free."""
        if not self._answers.choices:
            return None
        return statistics.fmean(1 / len(question.choices) for question in self.problems)

    def _verdict(self, question: Question, sample: Sample) -> Verdict:
        if question.scored:
            return self._by_likelihood(question, sample)
        if sample.finish == LENGTH:
            return Verdict(kind=VerdictClass.CUT_OFF, official=None, detail=f"after {sample.tokens} tokens")
        if question.choices:
            return self._matcher.letter(sample.completion, question.choices, question.right)
        return self._matcher.verdict(sample.completion, question.answer)

    def _by_likelihood(self, question: Question, sample: Sample) -> Verdict:
        if sample.choices is None or len(sample.choices) != len(question.choices):
            return unanswered(sample.completion, "comes without a likelihood for each choice")
        chosen = likeliest(sample.choices, per_token=self._answers.choose != "logprob")
        return verdict(chosen == question.right, question.choices[chosen], question.answer)


def likeliest(choices: Sequence[Mapping[str, float]], *, per_token: bool) -> int:
    """The index of the choice with the highest log-probability, in total or per token; the first one if several tie.

    `choices`: `logprob` and `tokens` of each, including the end of the turn.
    """
    scores = [choice["logprob"] / (choice["tokens"] if per_token else 1) for choice in choices]
    return scores.index(max(scores))
