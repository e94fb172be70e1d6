"""`python -m gemma4_tpu.report cost …`: what everything costs, as Markdown; every figure names its source."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma4_tpu.costing.cost import (
    NO,
    ROUNDED,
    YES,
    Compared,
    Prices,
    compare,
    generated_usd_per_million,
    solved,
    together,
    total_usd_per_million,
    training_usd,
    training_usd_per_million,
)
from gemma4_tpu.costing.figures import BY, Figure, Figures, Training
from gemma4_tpu.costing.plausibility import DOUBTFUL, IMPOSSIBLE, Judgement, judge, worst
from gemma4_tpu.costing.read import read
from gemma4_tpu.markdown import table
from gemma4_tpu.prices import FLEX_START, ON_DEMAND, SPOT, spoken
from gemma4_tpu.tracking.files import write_text

UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class CostTerms:
    """What costs are calculated from, besides the records."""

    prices: Prices = field(default_factory=Prices)
    """Given prices take precedence over those of `prices.yaml`."""
    serving_hours: Sequence[float]
    """Hours of serving in the totals of training and serving."""
    serving_slices: Sequence[str] = ()
    """Slices to serve on, besides those of the load tests."""


def show_costs(places: Sequence[str], terms: CostTerms, out: str | None, command: str) -> int:
    """Writes the costs of the records in `places` to the file `out` or the terminal. Returns 0."""
    deliver(cost_report(read(places), terms, command), out)
    return 0


def cost_report(figures: Figures, terms: CostTerms, command: str | None = None) -> str:
    """The report on what everything costs; `command` reproduces it."""
    prices, hours, slices = terms.prices, terms.serving_hours, terms.serving_slices
    kinds = _kinds(figures, prices, slices)
    parts = [head("Costs", command), _prices(figures, prices, slices, kinds)]
    if figures.trainings:
        parts.append(_trainings(figures, prices, kinds))
    if figures.points:
        parts.append(_points(figures, prices, kinds))
    if figures.evaluations:
        parts.append(_evaluations(figures, prices, kinds))
    if together(figures, slices):
        parts.append(_totals(figures, prices, hours, slices, kinds))
    if figures.printed:
        parts.append(_printed(compare(figures, prices, hours, slices)))
    parts.append(remarks(figures.cost_remarks))
    return joined(parts)


def _usd(amount: float | None, places: int = 2) -> str:
    return UNKNOWN if amount is None else f"${amount:,.{places}f}"


def _small_usd(amount: float | None) -> str:
    """Dollars to three significant digits, with at least two decimals."""
    if amount is None or amount >= 1 or amount == 0:
        return _usd(amount)
    return _usd(amount, max(2, 2 - math.floor(math.log10(amount))))


def _span(training: Training, amount: float | None, told: Callable[[float], str], *, per_hour: bool = False) -> str:
    """An amount that grows with a training run's hours (`per_hour`: shrinks): both ends if these are a band."""
    if amount is None or training.band is None:
        return UNKNOWN if amount is None else told(amount)
    low, high = (1 / training.band[1], 1 / training.band[0]) if per_hour else training.band
    return f"{told(amount * low)} to {told(amount * high)}"


def _number(amount: float | None) -> str:
    return UNKNOWN if amount is None else f"{amount:,.0f}"


def _slices(figures: Figures, slices: Sequence[str]) -> list[str]:
    every = [*figures.trainings, *figures.points, *figures.evaluations]
    return list(dict.fromkeys([*(figure.slice for figure in every), *slices]))


def _kinds(figures: Figures, prices: Prices, slices: Sequence[str]) -> list[str]:
    """On demand; spot if the price of one of the slices is known; flex-start if something ran on it."""
    used = {training.kind for training in figures.trainings}
    if any(prices.of(name, SPOT) for name in _slices(figures, slices)):
        used.add(SPOT)
    return [kind for kind in (ON_DEMAND, SPOT, FLEX_START) if kind == ON_DEMAND or kind in used]


def _prices(figures: Figures, prices: Prices, slices: Sequence[str], kinds: Sequence[str]) -> Iterator[str]:
    yield from ["## Prices", ""]
    rows = []
    for name in _slices(figures, slices):
        for kind in kinds:
            price = prices.of(name, kind)
            told = (
                [_usd(price.usd_per_hour), price.region or "", price.date, price.source]
                if price
                else [UNKNOWN, "", "", ""]
            )
            rows.append([name, spoken(kind), *told])
    for training in figures.trainings:
        if training.usd_per_hour is not None:
            row = [training.slice, spoken(training.kind), _usd(training.usd_per_hour), training.region or ""]
            rows.append([*row, "", f"configuration of {training.name}"])
    yield from table(["slice", "", "USD per hour", "region", "date", "source"], rows)
    if SPOT not in kinds:
        first = _slices(figures, slices)[0]
        yield f"No spot price with a source is known; give today's: `'spot_prices={{{first}: …}}'`."
        yield ""


def _trainings(figures: Figures, prices: Prices, kinds: Sequence[str]) -> Iterator[str]:
    yield from ["## Training", ""]
    heads = ["run", "", "slice", "hours", "real tokens/s", "million real tokens"]
    for kind in kinds:
        heads += [f"whole run, {spoken(kind)}", f"per million real tokens, {spoken(kind)}"]
    rows = []
    for training in figures.trainings:
        tokens = training.real_tokens
        row = [training.name, BY[training.label], training.slice, _span(training, training.hours, "{:,.4g}".format)]
        row += [
            _span(training, training.real_tokens_per_second, _number, per_hour=True),
            UNKNOWN if tokens is None else f"{tokens / 1e6:,.4g}",
        ]
        for kind in kinds:
            row.append(_span(training, training_usd(training, prices, kind), _small_usd))
            row.append(_span(training, training_usd_per_million(training, prices, kind), _small_usd))
        rows.append(row)
    yield from table(heads, rows)
    yield from sources(figures.trainings)


def _points(figures: Figures, prices: Prices, kinds: Sequence[str]) -> Iterator[str]:
    yield from ["## Serving, by context length", ""]
    judged, _ = judge(figures)
    heads = ["load", "", "slice", "in", "out", "generated tokens/s", "share of ceiling", "million tokens per hour"]
    for kind in kinds:
        heads += [f"per million generated, {spoken(kind)}", f"per million in and out, {spoken(kind)}"]
    rows = []
    for point in figures.points:
        rate = point.output_tokens_per_second
        if rate is None:
            continue
        row = [point.name, BY[point.label], point.slice, _number(point.input_tokens), _number(point.output_tokens)]
        row += [_number(rate), _share(worst(judged, point)), f"{rate * 3600 / 1e6:,.2f}"]
        for kind in kinds:
            row.append(_small_usd(generated_usd_per_million(point, prices, kind)))
            row.append(_small_usd(total_usd_per_million(point, prices, kind)))
        rows.append(row)
    yield from table(heads, rows)
    yield "Prices assume a server that is paid for around the clock and always as busy as in the load test."
    yield "*Per million generated* counts only answers; *in and out* spreads the same dollars over prompts and answers."
    yield "The share of the ceiling is that of the figure nearest to its ceiling, latencies included."
    yield ""
    yield from sources(figures.points)


def _share(judgement: Judgement | None) -> str:
    if judgement is None:
        return UNKNOWN
    mark = f" **{judgement.verdict}**" if judgement.verdict in (IMPOSSIBLE, DOUBTFUL) else ""
    return f"{judgement.share:.0%}{mark}"


def _evaluations(figures: Figures, prices: Prices, kinds: Sequence[str]) -> Iterator[str]:
    yield from ["## Per solved problem", ""]
    heads = ["evaluation", "", "samples", "that pass"]
    for kind in kinds:
        heads += [f"all samples, {spoken(kind)}", f"per passing sample, {spoken(kind)}"]
    rows = []
    for evaluation in figures.evaluations:
        row = [evaluation.name, BY[evaluation.label], _number(evaluation.samples), _number(evaluation.passing)]
        by = UNKNOWN
        for kind in kinds:
            found = solved(evaluation, figures, prices, kind)
            row += [_small_usd(found.usd if found else None), _small_usd(found.usd_per_pass if found else None)]
            by = found.by if found else by
        rows.append([*row, by])
    yield from table([*heads, "by"], rows)
    yield "Dollars of all samples divided by those that pass: the cost of a solution if you sample until one passes,"
    yield "without training."
    yield ""
    yield from sources(figures.evaluations)


def _totals(
    figures: Figures, prices: Prices, hours: Sequence[float], slices: Sequence[str], kinds: Sequence[str]
) -> Iterator[str]:
    yield from ["## Training and serving together", ""]
    heads = ["", "trained on", "served on", "", "training", "an hour of serving"]
    rows = []
    for pair in together(figures, slices):
        for kind in kinds:
            if kind != ON_DEMAND and pair.usd(0, prices, kind) is None:
                continue
            row = [pair.name, pair.training.slice, pair.slice, spoken(kind)]
            row += [_small_usd(training_usd(pair.training, prices, kind)), _usd(prices.hourly(pair.slice, kind))]
            rows.append([*row, *(_usd(pair.usd(number, prices, kind)) for number in hours)])
    yield from table([*heads, *(f"+ {number:g} h" for number in hours)], rows)


def _printed(found: Sequence[Compared]) -> Iterator[str]:
    kinds = {agrees: [one for one in found if one.agrees == agrees] for agrees in (YES, ROUNDED, NO)}
    yield from ["## What the source prints", ""]
    yield f"Of {len(found)} printed numbers {len(kinds[YES])} follow from the inputs above, {len(kinds[ROUNDED])} once"
    yield f"intermediate tokens or prices are rounded, {len(kinds[NO])} do not."
    yield ""
    words = {YES: "yes", ROUNDED: "once rounded", NO: "**no**"}
    rows = [[one.printed.where, one.printed.what, one.printed.printed, one.shown, words[one.agrees]] for one in found]
    yield from table(["where", "what", "printed", "from its inputs", "agrees"], rows)
    for agrees, title in ((NO, "Where it disagrees"), (ROUNDED, "What was rounded")):
        if kinds[agrees]:
            yield from [f"### {title}", ""]
            for one in kinds[agrees]:
                where, note = f"{one.printed.where}, {one.printed.what}", one.printed.note
                yield f"- {where}: printed {one.printed.printed}, from its inputs {one.shown}. {note}".rstrip()
            yield ""


# ── shared by the pages about figures ──────────────────────────────────────────────────────────────────────────────


def head(title: str, command: str | None) -> Iterator[str]:
    """The title, and the command that produces the page."""
    yield from [f"# {title}", ""]
    if command:
        yield from ["Made by:", "", f"    {command}", ""]


def sources(figures: Sequence[Figure]) -> Iterator[str]:
    """Each source of the figures, once."""
    yield from dict.fromkeys(f"- {BY[one.label]}: {one.source}" for one in figures)
    yield ""


def remarks(told: Sequence[str]) -> Iterator[str]:
    """A section of remarks, if there are any."""
    if told:
        yield from ["## Remarks", "", *(f"- {remark}" for remark in dict.fromkeys(told)), ""]


def joined(parts: Iterable[Iterable[str]]) -> str:
    """All lines as one text."""
    return "\n".join(line for part in parts for line in part) + "\n"


def deliver(text: str, out: str | None) -> None:
    """Writes the text to the file `out`, else to the terminal."""
    if out is None:
        print(text, end="")
        return
    write_text(Path(out), text)
    print(f"written: {out}")


def command_line(subject: str, places: Sequence[str], changed: Mapping[str, Any]) -> str:
    """The command line that produces the same report."""
    words = [f"{key}={_written(value)}" for key, value in changed.items()]
    return shlex.join(["python", "-m", "gemma4_tpu.report", subject, *places, *words])


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {each:g}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in value) + "]"
    return str(value)
