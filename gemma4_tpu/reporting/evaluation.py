"""`report.md` and its plot: everything a reader needs to decide whether to trust a score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.evals.compare import Comparison
from gemma4_tpu.evals.passk import Score
from gemma4_tpu.evals.problems import HOW_TO_STOP_LEAKS, VerdictClass
from gemma4_tpu.evals.scores import CLASSES, MISSING, EvaluationOutcome
from gemma4_tpu.markdown import table
from gemma4_tpu.plotting import new_figure
from gemma4_tpu.reporting import accuracy
from gemma4_tpu.tracking.files import write_text

PAPER = (
    ("the paper's TPU run", "0.641 [0.574, 0.706]", "0.795"),
    ("the paper's GPU run", "0.697 [0.633, 0.760]", "0.814"),
)
"""Quoted: 31B, n = 5, temperature 0.8, top_p 0.95, scored by the paper's own rule on 156 problems."""

_COLORS = {
    "pass": "#4c9a5b", "mismatch": "#d9692c", "syntax": "#8d6cab", "elaboration": "#b79fd0",
    "forbidden construct": "#333333", "runtime": "#c9a227", "timeout": "#7a5c1e", "no result": "#999999",
    "leaked thought": "#4c78a8", "wrong": "#d9692c", "unanswered": "#999999", "cut off": "#c9a227", MISSING: "#dddddd",
}  # fmt: skip
_SCOPES = {"all": "all", "can_pass": "that can pass here", "strong": "these without vacuous benches"}
_MOST_DISAGREEMENTS = 20
_MOST_PROBLEMS = 500
_WIDEST_LIST = 60  # the most problems whose names fit under the bars


def write_report(
    path: Path, outcomes: Sequence[EvaluationOutcome], *, comparison: Comparison | None, prompt: str | None,
    packages: dict[str, str], plots: Sequence[Path],
) -> None:  # fmt: skip
    """Writes `report.md`.

    Args:
      path: the file.
      outcomes: with the subject first.
      comparison: of the first two outcomes, if there are two.
      prompt: an example prompt, exactly as the model saw it.
      packages: name → version.
      plots: files next to the report.
    """
    lines = list(_report(outcomes, comparison, prompt, packages))
    shown = [f"![{plot.stem}]({plot.relative_to(path.parent)})" for plot in plots]
    write_text(path, "\n".join([*lines[:1], "", *shown, *lines[1:]]) + "\n")


def summary(outcome: EvaluationOutcome) -> str:
    """The score for a terminal."""
    lines = [f"{outcome.name}: {outcome.samples} samples of {len(outcome.problems)} problems ({outcome.benchmark})"]
    lines += [f"  {outcome.metric(score.k)}  {score}" for score in outcome.scores()["strict"]["all"]]
    listed = ", ".join(f"{kind} {count}" for kind, count in outcome.classes.items())
    lines.append(f"  {listed}; cut off {outcome.truncated}")
    if against := sum(row["second"] == "differs" for row in outcome.second.get("disagreements", [])):
        lines.append(f"  {against} samples pass but differ from the reference under fresh stimulus: see the report")
    lines += [f"  {said}" for said in outcome.benches if outcome.vacuous]
    return "\n".join(lines)


def _report(
    outcomes: Sequence[EvaluationOutcome], comparison: Comparison | None, prompt: str | None, packages: dict[str, str]
) -> Iterator[str]:
    subject = outcomes[0]
    yield f"# {subject.benchmark}: {', '.join(outcome.name for outcome in outcomes)}"
    yield from _scores(outcomes)
    if comparison:
        yield from ["", "## What can be claimed", "", *(f"- {claim}" for claim in comparison.claims())]
    yield from accuracy.by_category(outcomes, comparison)
    for outcome in outcomes:
        yield from _samples(outcome)
        yield from accuracy.examples(outcome)
        if outcome.second:
            yield from _second_opinions(outcome)
    yield from _settings(outcomes, packages)
    if prompt is not None:
        yield from ["", "## The first prompt, as the model saw it", "", "````text", prompt, "````"]
    yield from _problems(outcomes)


def _scores(outcomes: Sequence[EvaluationOutcome]) -> Iterator[str]:
    yield from ["", "## Scores", ""]
    rows = []
    for outcome in outcomes:
        for rule, scopes in outcome.scores().items():
            for scope, found in scopes.items():
                if (scope == "can_pass" and not outcome.cannot_pass) or (scope == "strong" and not outcome.vacuous):
                    continue
                first = [outcome.name, rule]
                rows += [
                    [*first, f"{score.problems} ({_SCOPES[scope]})", *score_cells(outcome, score)] for score in found
                ]
    yield from table(["", "rule", "problems", "score", "95% interval over problems", "sampling error"], rows)
    if outcomes[0].answers:
        yield from accuracy.how(outcomes[0].answers)
        return
    yield from outcomes[0].benches
    if "confirmed" in outcomes[0].scores():
        yield "Confirmed: strict, and no second opinion disagrees (see below)."
    yield "Strict: no errors, as many comparisons as the reference makes, and no way around the test bench."
    yield "Official: the benchmark's own rule on the same code. The estimator is unbiased (1 − C(n−c, k)/C(n, k))."
    if outcomes[0].benchmark == "verilog_eval":
        yield ""
        yield "Quoted from the paper (31B, n = 5, temperature 0.8, top_p 0.95, its own rule):"
        yield ""
        yield from list(table(["", "pass@1", "pass@5"], PAPER))[:-1]


def score_cells(outcome: EvaluationOutcome, score: Score) -> list[str]:
    """Table cells: score, interval over problems and sampling error."""
    unknown = "none (greedy)" if outcome.greedy else "unknown"
    error = unknown if score.sampling_error is None else f"{score.sampling_error:.4f}"
    name = outcome.metric(score.k).removeprefix("pass")
    return [f"{name} **{score.value:.3f}**", f"{score.low:.3f} to {score.high:.3f}", error]


def _samples(outcome: EvaluationOutcome) -> Iterator[str]:
    total = outcome.samples
    yield from ["", f"## Samples: {outcome.name}", ""]
    rows = [[kind, count, f"{count / total:.1%}"] for kind, count in outcome.classes.items()]
    yield from table(["verdict", "samples", "share"], rows)
    yield f"Cut off at the token limit: {outcome.truncated} of {total} ({outcome.truncated / total:.1%})."
    if leaked := outcome.classes.get(VerdictClass.LEAKED):
        yield f"Leaked thoughts, not judged and counted as failures: {leaked}. {HOW_TO_STOP_LEAKS}"
    if outcome.missing:
        yield f"Never obtained, and counted as failures: {outcome.missing}."
    if outcome.tokens:
        seconds = outcome.generation_seconds
        took = f" (this start: {seconds:.0f} s)" if seconds else ""
        yield f"Generated tokens: {outcome.tokens:,}{took}."


def _second_opinions(outcome: EvaluationOutcome) -> Iterator[str]:
    """The section on what fresh stimulus, proofs and other tools say about the samples."""
    second, rows = outcome.second, outcome.second["disagreements"]
    against = sum(row["second"] == "differs" for row in rows)
    yield from ["", f"## Second opinions: {outcome.name}", ""]
    yield (
        f"Every sample that ran, compared with the reference under random stimulus (seed {second['seed']}): of those"
        f" that pass, {against} differ from it; of those that fail, {len(rows) - against} do not. A sample that passes"
        " but differs may have memorised the bench, or may choose differently where the specification leaves a choice."
    )
    if any(second["proofs"].values()):
        yield f"By proof (yosys, combinational samples that pass): {_counts(second['proofs'])}."
    for name, found in second["columns"].items():
        yield f"{name}: median {found['median']:g} over {found['samples']} samples that pass."
    for reason, count in Counter(second["without"].values()).items():
        yield f"None for {count} problems: {reason}."
    if rows:
        yield ""
        shown = [[*row.values()] for row in rows[:_MOST_DISAGREEMENTS]]
        yield from list(table(["problem", "sample", "verdict", "second opinion", ""], shown))[:-1]
        if len(rows) > _MOST_DISAGREEMENTS:
            yield from ["", f"And {len(rows) - _MOST_DISAGREEMENTS} more, in result.json."]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _settings(outcomes: Sequence[EvaluationOutcome], packages: dict[str, str]) -> Iterator[str]:
    yield from ["", "## Settings", ""]
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.settings))
    rows = [[key, *(outcome.settings.get(key) for outcome in outcomes)] for key in keys]
    yield from table(["", *(outcome.name for outcome in outcomes)], rows)
    if check := outcomes[0].selfcheck:
        yield from [f"Simulator {check['simulator']}, sandbox {check['sandbox']}."]
    yield "Packages: " + ", ".join(f"{name} {version}" for name, version in sorted(packages.items())) + "."
    if outcomes[0].cannot_pass:
        yield from ["", "Problems whose own reference fails here:", ""]
        yield from (f"- {name}: {reason}" for name, reason in outcomes[0].cannot_pass.items())


def _problems(outcomes: Sequence[EvaluationOutcome]) -> Iterator[str]:
    yield from ["", "## Problems", ""]
    ruled = not outcomes[0].answers  # the benchmark has a rule of its own
    official = ["official"] if ruled else []
    heads = [head for o in outcomes for head in (f"{o.name}: passed of n", *official, "other verdicts")]
    rows = []
    for name in list(outcomes[0].problems)[:_MOST_PROBLEMS]:
        cells = [name]
        for outcome in outcomes:
            problem = outcome.problems[name]
            others = ", ".join(f"{kind} {count}" for kind, count in problem.classes.items() if kind != "pass")
            cells += [f"{problem.passed} of {problem.n}", *([str(problem.official)] if ruled else []), others]
        rows.append(cells)
    yield from list(table(["problem", *heads], rows))[:-1]
    if (left := len(outcomes[0].problems) - len(rows)) > 0:
        yield from ["", f"And {left:,} more, in result.json."]


def plot_outcomes(outcomes: Sequence[EvaluationOutcome], plots: Path) -> Path:
    """Draws the plot of an evaluation, in the folder `plots`."""
    if outcomes[0].answers:
        return accuracy.plot_categories(outcomes, plots / "categories.png")
    return plot_problems(outcomes, plots / "problems.png")


def plot_problems(outcomes: Sequence[EvaluationOutcome], path: Path) -> Path:
    """Draws a bar per problem, its samples by verdict; a panel per outcome, problems sorted by the subject's passes."""
    from matplotlib.patches import Patch

    names = sorted(
        outcomes[0].problems,
        key=lambda name: [-o.problems[name].classes.get(kind, 0) for o in outcomes for kind in CLASSES],
    )
    labelled = len(names) <= _WIDEST_LIST
    height = 2.6 * len(outcomes) + (1.6 if labelled else 0.6)
    with new_figure(path, (10, height), {"axes.grid": False}) as figure:
        panels = figure.subplots(len(outcomes), 1, sharex=True, squeeze=False)[:, 0]
        for axes, outcome in zip(panels, outcomes, strict=True):
            _bars(axes, outcome, names)
        panels[-1].set_xlabel(f"{len(names)} problems, sorted by what {outcomes[0].name} passes")
        panels[-1].set_xticks(range(len(names)) if labelled else [], names if labelled else [], rotation=90, fontsize=6)
        used = [kind for kind in CLASSES if any(kind in outcome.classes for outcome in outcomes)]
        handles = [Patch(color=_COLORS[kind], label=kind) for kind in used]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(used), 5))
    return path


def _bars(axes: Any, outcome: EvaluationOutcome, names: Sequence[str]) -> None:
    bottom = [0.0] * len(names)
    for kind in CLASSES:
        shares = [outcome.problems[name].classes.get(kind, 0) / outcome.problems[name].n for name in names]
        if any(shares):
            axes.bar(range(len(names)), shares, bottom=bottom, width=1.0, color=_COLORS[kind], linewidth=0)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    first = outcome.scores()["strict"]["all"][0]
    axes.set_title(f"{outcome.name}: pass@1 {first.value:.3f} [{first.low:.3f}, {first.high:.3f}], n = {outcome.n}")
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of samples")
