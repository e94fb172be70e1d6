"""Scores by lm-evaluation-harness: the report of one evaluation, and the section of a run's page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma4_tpu.costing.figures import BY, MEASURED
from gemma4_tpu.evals.harness import HarnessOutcome, compare_harness
from gemma4_tpu.markdown import code, link, plain, table
from gemma4_tpu.reporting.found import Records
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.tracking.records import HARNESS, result_of

_HEADS = ("task", "version", "shots", "documents", "metric", "score", "standard error")
_ARROWS = {True: " ↑", False: " ↓", None: ""}
"""Whether higher is better → arrow; None: lm_eval doesn't say."""


def harness_summary(outcome: HarnessOutcome) -> str:
    """The scores for a terminal."""
    lines = [f"{outcome.model} by lm_eval {outcome.lm_eval}"]
    for name, task in outcome.tasks.items():
        for metric, score in task.metrics.items():
            error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            lines.append(f"  {name}  {metric}{_ARROWS[score.higher_is_better]}  {score.value:.4f}{error}")
    return "\n".join(lines)


def write_harness_report(outcome: HarnessOutcome, path: Path) -> None:
    """Writes the report of one evaluation."""
    settings = [[key, plain(value)] for key, value in outcome.settings.items()]
    lines = [
        f"# lm-evaluation-harness: {plain(outcome.model)}", "",
        f"{BY[MEASURED]} by lm_eval {plain(outcome.lm_eval)} on {code(outcome.settings['endpoint'])}. Standard errors"
        " are lm_eval's own. ↑ means that higher is better.", "",
        *table(_HEADS, list(_rows(outcome)), "llrrlrr"), "## Settings", "", *table(["", ""], settings),
        "lm_eval's configuration is in lm_eval.yaml, its output in lm_eval.log, its own results in lm_eval/.",
    ]  # fmt: skip
    write_text(path, "\n".join(lines) + "\n")


def _rows(outcome: HarnessOutcome) -> Iterator[list[str]]:
    for name, task in outcome.tasks.items():
        for metric, score in task.metrics.items():
            error = "unknown" if score.stderr is None else f"{score.stderr:.4f}"
            counts = ["" if count is None else f"{count:,}" for count in (task.shots, task.documents)]
            named = f"{plain(metric)}{_ARROWS[score.higher_is_better]}"
            yield [plain(name), plain(task.version), *counts, named, f"{score.value:.4f}", error]


def other_benchmarks(records: Records, page: Path) -> Iterator[str]:
    """The section of a run's page about lm_eval's benchmarks; nothing if there are none."""
    finished = [folder for folder in records.by_kind[HARNESS] if result_of(folder).values.get("status") == "finished"]
    if not finished:
        return
    yield from ["## Other benchmarks", ""]
    yield f"{BY[MEASURED]} by lm-evaluation-harness on a server; standard errors are its own."
    yield ""
    outcomes = [HarnessOutcome.read(folder) for folder in finished]
    rows = [
        [plain(folder.name), plain(o.model), *row]
        for folder, o in zip(finished, outcomes, strict=True)
        for row in _rows(o)
    ]
    yield from table(["evaluation", "model", *_HEADS], rows, "llllrrlrr")
    if len(finished) == 2 and {*outcomes[0].tasks} & {*outcomes[1].tasks}:
        claims = compare_harness(*finished).claims(*(folder.name for folder in finished))
        yield from (f"- {plain(claim)}" for claim in claims)
        yield ""
    yield from [f"In full: {', '.join(link(f / 'report.md', page, f'{f.name}/report.md') for f in finished)}", ""]
