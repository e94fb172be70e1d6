"""Sections about what surrounds a run: its plan, merged model, evaluations, servers, load tests and cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma4_tpu.costing.figures import BY, ESTIMATED, MEASURED, QUOTED, Figures
from gemma4_tpu.costing.read import read
from gemma4_tpu.errors import UserError
from gemma4_tpu.evals.compare import compare
from gemma4_tpu.evals.scores import EvaluationOutcome
from gemma4_tpu.markdown import below, code, included, link, pictures, plain, shown, table
from gemma4_tpu.planning.estimate import PlanResult
from gemma4_tpu.prices import KINDS
from gemma4_tpu.reporting.costs import CostTerms, cost_report
from gemma4_tpu.reporting.evaluation import score_cells
from gemma4_tpu.reporting.found import Records
from gemma4_tpu.reporting.plan_rows import plan_rows
from gemma4_tpu.tracking.progress import format_seconds
from gemma4_tpu.tracking.records import (
    EVALUATION,
    LOAD_TEST,
    MERGE,
    PLAN,
    PLAN_FILE,
    SERVING,
    TRAINING,
    Record,
    read_record,
    result_of,
)  # fmt: skip

_MEASURED, _ESTIMATED = BY[MEASURED], BY[ESTIMATED]
BASE = "base"


# ── plan ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def plans_of(records: Records) -> list[tuple[Path, PlanResult]]:
    """Each plan with its folder."""
    found = []
    for folder in records.by_kind[PLAN]:
        if not (folder / PLAN_FILE).is_file():
            continue
        known = read_record(folder / PLAN_FILE).values
        try:
            values = {key: value for key, value in known.items() if key in PlanResult.__dataclass_fields__}
            found.append((folder, PlanResult(**values)))
        except TypeError as error:
            raise UserError(f"{folder / 'plan.json'}: no plan ({error})") from None
    return found


def plan(records: Records, page: Path) -> Iterator[str]:
    """The section about plans: what was expected before the run."""
    yield from ["## Plan", ""]
    plans = plans_of(records)
    if not plans:
        run = shown(records.run.address)
        yield f"No plan was found; {code(f'python -m gemma4_tpu.plan replay={run} hardware=<slice>')} makes one, and"
        yield from [f"{code('records=[<its folder>]')} adds an existing one.", ""]
    for folder, result in plans:
        if len(plans) > 1:
            yield from [f"### {plain(folder.name)}", ""]
        yield f"{_ESTIMATED} by the TPU compiler and `hardware.py`, without a TPU: {link(folder / 'plan.json', page)}."
        yield ""
        yield from table(["", _ESTIMATED], [[plain(label.strip()), plain(value)] for label, value in plan_rows(result)])
        yield from pictures([folder / "hbm.png"], page)


# ── merge ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def merge(records: Records, page: Path) -> Iterator[str]:
    """The section about the merged model: where it is, and whether it is the trained one."""
    yield from ["## Merged model", ""]
    if not records.by_kind[MERGE]:
        told = code(f"python -m gemma4_tpu.merge run={shown(records.run.address)}")
        yield from [f"Not merged: no record of it was found; {told} does it.", ""]
    for folder in records.by_kind[MERGE]:
        found = result_of(folder).values
        if len(records.by_kind[MERGE]) > 1:
            yield from [f"### {plain(folder.name)}", ""]
        rows = [["Status", _status(found), ""]]
        if found.get("update") is not None:
            rows.append(["Update", f"{found['update']:,}", ""])
        rows += [[kind.capitalize(), code(shown(target)), ""] for kind, target in (found.get("targets") or {}).items()]
        if found.get("changed_weights") is not None:
            rows.append(["Weights changed", f"{found['changed_weights']:,}", _MEASURED])
        if found.get("seconds") is not None:
            rows.append(["Time", format_seconds(found["seconds"]), _MEASURED])
        if found.get("status") == "finished":
            rows += _parity(found.get("parity")) + _quantised(found.get("quantised"))
        yield from table(["", "figure", "by"], rows)
        yield from pictures([folder / "plots" / "deltas.png"], page)
        if (folder / "deltas.md").is_file():
            yield from [f"What the merge added, {_MEASURED}:", "", *included(folder / "deltas.md", page, 2), ""]


def _status(found: Mapping[str, Any]) -> str:
    """How the work of a record ended."""
    if not found:
        return "not finished (no `result.json`)"
    return plain(found.get("status", "")) + (f": {plain(found['error'])}" if found.get("error") else "")


def _parity(parity: Mapping[str, Any] | None) -> list[list[str]]:
    """Rows on how closely the merged model matches base + LoRA."""
    if not parity:
        return [["Comparison with base + LoRA", "not made", ""]]
    rows = [["Comparison with base + LoRA", "passed" if parity.get("passed") else "**failed**", _MEASURED]]
    if logits := parity.get("logits"):
        rows += [
            ["Logits off by", f"{logits['merged_to_lora']:.1e} ({logits['rounded_to_lora']:.1e} is rounding to"
             f" {plain(logits['dtype'])})", _MEASURED],
            ["Effect of training on logits", f"{logits['base_to_lora']:.1e}", _MEASURED],
            ["Same most likely token", f"{logits['top1_agreement']:.1%} of {logits['tokens']}", _MEASURED],
            ]  # fmt: skip
    return rows


def _quantised(found: Mapping[str, Any] | None) -> list[list[str]]:
    """Rows on how closely the quantised model matches the merged one."""
    if not found:
        return []
    scheme = plain(found["scheme"])
    rows = [[f"Weights in {scheme} off by", f"{found['mean_error']:.2%} (rms, mean of the tensors)", _MEASURED]]
    if logits := found.get("logits"):
        off = f"{logits['max_logprob_difference']:.2g} at most, {logits['mean_logprob_difference']:.2g} on average"
        rows += [
            [f"Log-probabilities in {scheme} off by", off, _MEASURED],
            [f"Same most likely token in {scheme}", f"{logits['top1_agreement']:.1%} of {logits['tokens']}", _MEASURED],
        ]
    return rows


# ── evaluation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def outcomes_of(records: Records) -> list[tuple[Path, EvaluationOutcome]]:
    """Every subject of every finished evaluation, with its folder: trained models first, bases last."""
    places = [
        (folder, place)
        for folder in records.by_kind[EVALUATION]
        for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir()))
        if _is_scored(result_of(place))
    ]
    found = [(folder, EvaluationOutcome.read(place / "result.json")) for folder, place in places]
    return sorted(found, key=lambda pair: pair[1].name == BASE)


def _is_scored(found: Record) -> bool:
    return found.kind == EVALUATION and not found.failed


def evaluation(records: Records, page: Path) -> Iterator[str]:
    """The section about evaluations: all scores in one table, and what can be claimed against the base."""
    yield from ["## Evaluation", ""]
    found = outcomes_of(records)
    for folder in records.by_kind[EVALUATION]:
        if folder not in [known for known, _ in found]:
            yield from [f"{plain(folder.name)}: {_status(result_of(folder).values)}.", ""]
    if not records.by_kind[EVALUATION]:
        told = code(f"python -m gemma4_tpu.evaluate run={shown(records.run.address)}")
        yield from [f"Not evaluated: no record of it was found; {told} does it.", ""]
    if not found:
        return
    yield f"{_MEASURED}: pass@k by simulation, accuracy by comparing answers; 95% intervals are over problems, errors"
    yield "are sampling errors. Strict: no simulation errors, as many comparisons as the reference makes, no way around"
    yield "the test bench. Official: the benchmark's own rule."
    yield ""
    heads = ["evaluation", "subject", "benchmark", "problems", "n", "rule", "score", "interval", "sampling error"]
    yield from table(heads, [row for folder, outcome in found for row in _scores(folder, outcome)], "lllrrllll")
    heads = ["evaluation", "subject", "samples", "verdicts", "cut off", "never obtained"]
    rows = []
    for folder, outcome in found:
        verdicts = ", ".join(f"{plain(kind)} {count:,}" for kind, count in outcome.classes.items())
        counts = [f"{outcome.truncated:,}", f"{outcome.missing:,}"]
        rows.append([plain(folder.name), plain(outcome.name), f"{outcome.samples:,}", verdicts, *counts])
    yield from table(heads, rows, "llrlrr")
    folders = list(dict.fromkeys(folder for folder, _ in found))
    yield from pictures([path for folder in folders for path in sorted((folder / "plots").glob("*.png"))], page)
    yield from _claims(found)
    whole = [folder / "report.md" for folder in folders if (folder / "report.md").is_file()]
    if whole:
        yield from [f"In full: {', '.join(link(path, page, f'{path.parent.name}/{path.name}') for path in whole)}", ""]


def _scores(folder: Path, outcome: EvaluationOutcome) -> Iterator[list[str]]:
    for rule, scopes in outcome.scores().items():
        for score in scopes["all"]:
            first = [plain(folder.name), plain(outcome.name), plain(outcome.benchmark), str(score.problems)]
            yield [*first, str(outcome.n), rule, *score_cells(outcome, score)]


def _claims(found: Sequence[tuple[Path, EvaluationOutcome]]) -> Iterator[str]:
    """Each trained model compared with a base on the same benchmark, preferably the base of its own evaluation."""
    for folder, outcome in found:
        bases = [
            (place, base) for place, base in found if base.name == BASE and base.benchmark == outcome.benchmark
        ]  # fmt: skip
        if outcome.name == BASE or not bases:
            continue
        _, base = next((pair for pair in bases if pair[0] == folder), bases[0])
        yield from [f"### {plain(folder.name)}: {plain(outcome.name)} compared with the base", ""]
        yield from (f"- {plain(claim)}" for claim in compare(outcome, base).claims())
        yield ""


# ── serving ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _answered(probe: Mapping[str, Any] | None) -> str:
    """The result of the check whether a server serves the trained model; with adapters, of each."""
    if not probe:
        return "not checked"
    if isinstance(told := probe.get("told"), str):  # else an adapter of that name
        return told
    return "; ".join(f"{name}: {_answered(each)}" for name, each in probe.items())


def serving(records: Records, page: Path) -> Iterator[str]:
    """The section about servers and their load tests."""
    yield from ["## Serving", ""]
    rows = []
    for folder in records.by_kind[SERVING]:
        found = result_of(folder).values
        ready, served = (found.get(key) for key in ("ready_seconds", "served_seconds"))
        rows.append([
            plain(folder.name), plain(found.get("slice", "–")), _status(found),
            "–" if ready is None else format_seconds(ready), "–" if served is None else format_seconds(served),
            plain(_answered(found.get("probe"))),
        ])  # fmt: skip
    if rows:
        yield from table(["server", "slice", "status", "ready after", "served for", "the trained model?"], rows)
        yield from [f"{_MEASURED}.", ""]
    else:
        told = code(f"python -m gemma4_tpu.serve run={shown(records.run.address)}")
        yield from [f"Not served: no record of a server was found; {told} starts one.", ""]
    yield from ["### Load", ""]
    if not records.by_kind[LOAD_TEST]:
        told = code("python -m gemma4_tpu.bench served=<record of the server>")
        yield from [f"Not benchmarked: no record of it was found; {told} does it.", ""]
    for folder in records.by_kind[LOAD_TEST]:
        report = folder / "report.md"
        if not report.is_file():
            yield from [f"{plain(folder.name)}: {_status(result_of(folder).values)}.", ""]
            continue
        yield from [f"#### {plain(folder.name)}", "", f"{_MEASURED}: {link(report, page)}, raw results next to it.", ""]
        yield from [*included(report, page, 3), ""]


# ── plausibility and cost ──────────────────────────────────────────────────────────────────────────────────────────


def figures_of(records: Records) -> Figures:
    """Figures of the run, if it has ended, and of the records about it that contain figures."""
    places = [records.run.path] if result_of(records.run.path).kind == TRAINING else []
    places += [folder for folder, _ in plans_of(records)]
    places += [folder for folder in records.by_kind[EVALUATION] if _is_scored(result_of(folder))]
    places += [folder for folder in records.by_kind[LOAD_TEST] if any((folder / "cells").glob("*.json"))]
    return read([shown(place) for place in places]) if places else Figures()


def cost(figures: Figures, terms: CostTerms) -> Iterator[str]:
    """The section about cost: dollars for everything recorded, as in `report cost`."""
    yield from ["## Cost", ""]
    everything = [*figures.trainings, *figures.points, *figures.evaluations]
    slices = list(dict.fromkeys([*(figure.slice for figure in everything), *terms.serving_slices]))
    configured = any(training.usd_per_hour is not None for training in figures.trainings)
    if not configured and not any(terms.prices.of(name, kind) for name in slices for kind in KINDS):
        names = ", ".join(slices) or "these records"
        given = code(f"'prices={{{slices[0] if slices else 'local'}: <USD per hour>}}'")
        yield from [f"No price is known for {plain(names)}, so no cost is shown; give {given}.", ""]
        return
    yield f"{_ESTIMATED}: the hours and rates in each row, times the dated prices that are {BY[QUOTED]} below."
    yield ""
    yield from below(cost_report(figures, terms), 1)
