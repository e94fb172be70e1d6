"""Report sections for answers scored by comparison: the rule, scores by category, incorrect answers, the plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.evals.compare import Comparison
from gemma4_tpu.evals.passk import Score
from gemma4_tpu.evals.scores import EvaluationOutcome
from gemma4_tpu.markdown import code, plain, table
from gemma4_tpu.plotting import new_figure

ALL = "all"
READ_AS = {
    "exact": "as they are", "stripped": "without white space around them",
    "casefold": "without case and runs of white space", "number": "as the one number in each",
    "json": "as JSON values",
}  # fmt: skip
CHOSEN_BY = {
    "letter": "by the letter that was generated",
    "logprob": "by the likelihood of each choice, the end of the turn included",
    "logprob_per_token": "by the likelihood per token of each choice, the end of the turn included",
}


def how(answers: Mapping[str, Any]) -> Iterator[str]:
    """States in sentences when an answer counts as correct."""
    if choose := answers.get("choose"):
        yield f"Answers are chosen {CHOSEN_BY[choose]} ({code(f'eval.answers.choose={choose}')})."
        yield f"Chance level: {answers['chance']:.3f}."
    else:
        compare = answers["compare"]
        yield f"Both answers are read {READ_AS[compare]} and must then be equal ({code(f'compare={compare}')})."
    if answers.get("extract"):
        yield f"Only the last match of {code(answers['extract'])} in a text counts."
    yield "An answer that is cut off, empty or has nothing to compare counts as incorrect."


def by_category(outcomes: Sequence[EvaluationOutcome], comparison: Comparison | None) -> Iterator[str]:
    """A table of scores by category, with the paired difference if two outcomes are compared."""
    found = [outcome.categories() for outcome in outcomes]
    if not found[0]:
        return
    yield from ["", "## By category", ""]
    heads = ["category", "rows", *(f"{outcome.name} [95%]" for outcome in outcomes)]
    rows = []
    for category, score in found[0].items():
        cells = [plain(category), f"{score.problems:,}", *(_interval(scores[category]) for scores in found)]
        if comparison and (gap := comparison.categories.get(category)):
            cells.append(f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")
        rows.append(cells)
    if comparison:
        heads.append(f"{comparison.a} − {comparison.b}, paired [95%]")
    yield from list(table(heads, rows, "lr"))[:-1]


def examples(outcome: EvaluationOutcome) -> Iterator[str]:
    """Some of the incorrect answers."""
    shown = outcome.answers.get("examples")
    if not shown:
        return
    yield from ["", f"## Incorrect answers: {outcome.name}, the first {len(shown)}", ""]
    rows = [[plain(row["problem"]), row["kind"], plain(row["detail"])] for row in shown]
    yield from list(table(["row", "verdict", ""], rows))[:-1]
    yield from ["", "All verdicts are in verdicts.jsonl, all answers in samples.jsonl."]


def plot_categories(outcomes: Sequence[EvaluationOutcome], path: Path) -> Path:
    """Plots the accuracy of each outcome with its interval, over all rows and by category."""
    scores = [{ALL: outcome.scores()["strict"]["all"][0], **outcome.categories()} for outcome in outcomes]
    names = list(scores[0])
    with new_figure(path, (8, 1.2 + 0.32 * len(names) * len(outcomes))) as figure:
        axes = figure.subplots()
        for number, (outcome, found) in enumerate(zip(outcomes, scores, strict=True)):
            places = [row + 0.7 * (number + 0.5) / len(outcomes) - 0.35 for row in range(len(names))]
            values = [found[name].value for name in names]
            reach = [
                [found[name].value - found[name].low for name in names],
                [found[name].high - found[name].value for name in names],
            ]
            axes.barh(places, values, 0.6 / len(outcomes), xerr=reach, label=outcome.name, error_kw={"lw": 1})
        axes.set_yticks(range(len(names)), [f"{name} ({scores[0][name].problems:,})" for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("accuracy, with the 95% interval over rows")
        if len(outcomes) > 1:
            figure.legend(loc="outside lower center", ncols=len(outcomes))
    return path


def _interval(score: Score) -> str:
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
