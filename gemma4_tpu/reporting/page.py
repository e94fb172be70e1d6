"""`python -m gemma4_tpu.report run=…`: an overview, a comparison if there are several runs, then each run's sections.

The page is written as Markdown, and as HTML next to it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import gemma4_tpu
from gemma4_tpu.costing.figures import BY, ESTIMATED, MEASURED, QUOTED, Figures
from gemma4_tpu.markdown import below, code, pictures, plain, shown, table
from gemma4_tpu.prices import format_usd
from gemma4_tpu.reporting import afterwards, training
from gemma4_tpu.reporting.ceilings import nearest_to_ceiling
from gemma4_tpu.reporting.costs import CostTerms
from gemma4_tpu.reporting.curves import draw_curves
from gemma4_tpu.reporting.found import KINDS, OUTPUTS, Records, find
from gemma4_tpu.reporting.harness_tables import other_benchmarks
from gemma4_tpu.reporting.html import html_page
from gemma4_tpu.reporting.on_policy import on_policy
from gemma4_tpu.tracking.files import write_text
from gemma4_tpu.tracking.records import LOAD_TEST, MERGE, result_of

_MEASURED, _ESTIMATED = BY[MEASURED], BY[ESTIMATED]


def show_runs(runs: Sequence[str], others: Sequence[str], terms: CostTerms, out: str | None) -> int:
    """Writes a page and prints its path. Returns 0.

    Args:
      runs: folders of training runs.
      others: records about them, besides those that are found.
      terms: what costs are calculated from.
      out: the page; None: `report.md` in the run folder, or in `outputs/reports` for several runs.

    Raises:
      UserError: no run folder, a given folder without a record, a damaged record.
    """
    several = find(runs, others)
    page = Path(out).expanduser().absolute() if out else _default(several)
    page.parent.mkdir(parents=True, exist_ok=True)
    text = markdown_page(several, _command(runs, others), terms, page, page.with_name(f"{page.stem}_plots"))
    write_text(page, text)
    write_text(page.with_suffix(".html"), html_page(text, page.parent))
    for records in several:
        print(f"{shown(records.run.address)}: {_counted(records)}")
    print(f"report: {shown(page)}\n        {shown(page.with_suffix('.html'))}")
    return 0


def _default(several: list[Records]) -> Path:
    """The page in the run's folder; for several runs, in its own folder."""
    if len(several) == 1:
        return several[0].run.path / "report.md"
    return Path(OUTPUTS).absolute() / "reports" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S") / "report.md"


def _counted(records: Records) -> str:
    counts = {word: len(records.by_kind[kind]) for kind, word in KINDS.items()}
    return ", ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items())


def markdown_page(several: Sequence[Records], command: str, terms: CostTerms, page: Path, folder: Path) -> str:
    """The whole page.

    Args:
      several: one run, or several to compare.
      command: the command that produces the page.
      terms: what costs are calculated from.
      page: the file it will be written to; links and image paths are relative to its folder.
      folder: receives the plots drawn for the page.
    """
    figures = [afterwards.figures_of(records) for records in several]
    lines = [*_head(several, command)]
    if len(several) == 1:
        lines += _one(several[0], figures[0], page, folder)
    else:
        lines += _side_by_side(several, page, folder)
        for number, (records, own) in enumerate(zip(several, figures, strict=True), start=1):
            lines += [f"## {plain(records.name)}", ""]
            lines += [*below("\n".join(_one(records, own, page, folder / str(number))), 1), ""]
    lines += afterwards.cost(Figures.together(figures), terms)
    lines += _last(several)
    return "\n".join(lines).rstrip() + "\n"


def _command(runs: Sequence[str], others: Sequence[str]) -> str:
    words = [f"run=[{','.join(runs)}]" if len(runs) > 1 else f"run={runs[0]}"]
    words += [f"records=[{','.join(others)}]"] if others else []
    return shlex.join(["python", "-m", "gemma4_tpu.report", *words])


def _head(several: Sequence[Records], command: str) -> Iterator[str]:
    names = several[0].name if len(several) == 1 else f"{len(several)} runs"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield from [f"# {plain(names)}", ""]
    yield from [f"Made on {now} by gemma4-tpu {gemma4_tpu.__version__}: {code(command)}", ""]
    yield f"Every figure states its origin. {_MEASURED}: by this program, on the machine that its record names;"
    yield f"{_ESTIMATED}: calculated from what its row says; {BY[QUOTED]}: from a named source."
    yield ""


def _one(records: Records, figures: Figures, page: Path, folder: Path) -> Iterator[str]:
    """A run's own sections."""
    yield from ["## At a glance", ""]
    yield from table(["", "figure", "by"], [list(fact) for fact in _glance(records)])
    yield from afterwards.plan(records, page)
    yield from training.training(records, page, folder)
    yield from on_policy(records)
    yield from afterwards.merge(records, page)
    yield from afterwards.evaluation(records, page)
    yield from other_benchmarks(records, page)
    yield from afterwards.serving(records, page)
    yield from nearest_to_ceiling(figures)


def _last(several: Sequence[Records]) -> Iterator[str]:
    """Reference material: configuration and provenance of each run."""
    for part in (training.configuration, training.provenance):
        if len(several) == 1:
            yield from part(several[0])
            continue
        for number, records in enumerate(several):
            title, *lines = part(records)
            yield from [title, ""] if number == 0 else []
            yield from [f"### {plain(records.name)}", "", *lines]


def _glance(records: Records) -> Iterator[tuple[str, str, str]]:
    """The figures that people want first; their sections mention those that are missing."""
    result = training.result_of(records)
    if result is None:
        yield "Training", "has not ended", ""
    else:
        if result.status != "finished":
            yield "Training", plain(result.status), ""
        if result.heldout_loss_last is not None:
            yield "Held-out loss", training.heldout(result), _MEASURED
        yield "Real tokens trained", f"{result.real_tokens:,}", _MEASURED
        if result.real_tokens_per_second:
            yield "Real tokens per second, training", f"{result.real_tokens_per_second:,.0f}", _MEASURED
        if result.usd is not None:
            yield "Cost of the training run", format_usd(result.usd), _ESTIMATED
    yield from _planned(records)
    for folder in records.by_kind[MERGE]:
        if logits := (result_of(folder).values.get("parity") or {}).get("logits"):
            yield "Merged model's logits off by", f"{logits['merged_to_lora']:.1e}", _MEASURED
    yield from _scored(records)
    for folder in records.by_kind[LOAD_TEST]:
        if rate := result_of(folder).values.get("peak_output_throughput"):
            yield "Output tokens per second, served, at most", f"{rate:,.0f}", _MEASURED


def _planned(records: Records) -> Iterator[tuple[str, str, str]]:
    for _, result in afterwards.plans_of(records):
        if not result.fits:
            yield f"Planned on {plain(result.slice)}", "does not fit", _ESTIMATED
        elif rate := result.real_tokens_per_second:
            yield f"Real tokens per second, planned on {plain(result.slice)}", f"{rate['mid']:,.0f}", _ESTIMATED


def _scored(records: Records) -> Iterator[tuple[str, str, str]]:
    for folder, outcome in afterwards.outcomes_of(records):
        score = outcome.scores()["strict"]["all"][0]
        name = f"{outcome.metric(score.k)} on {plain(outcome.benchmark)}, {plain(outcome.name)}"
        yield name, f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]", f"{_MEASURED} in {plain(folder.name)}"


def _side_by_side(several: Sequence[Records], page: Path, folder: Path) -> Iterator[str]:
    """Where the runs differ, and the result of each."""
    yield from ["## Side by side", ""]
    names = [plain(records.name) for records in several]
    if rows := training.differences(several):
        yield from table(["configuration", *names], rows)
    else:
        yield from ["Their configurations are equal.", ""]
    results = [training.result_of(records) for records in several]
    known = [{what: (figure, by) for what, figure, by in training.facts(r)} if r else {} for r in results]
    rows = []
    for what in dict.fromkeys(what for one in known for what in one):
        by = next(one[what][1] for one in known if what in one)
        rows.append([what, *(one[what][0] if what in one else "–" for one in known), by])
    yield from table(["result", *names, "by"], rows, "l" + "r" * len(several))
    scores = [[plain(records.name), *fact] for records in several for fact in _scored(records)]
    if scores:
        yield from table(["run", "evaluation", "figure", "by"], scores)
    drawn = draw_curves([training.followed(records) for records in several], folder)
    yield from [f"{_MEASURED} at each update:", "", *pictures(drawn, page)] if drawn else ["No curves.", ""]
