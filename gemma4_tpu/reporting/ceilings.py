"""`python -m gemma4_tpu.report plausibility …`: throughputs and latencies compared with the slice's ceilings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma4_tpu.costing.figures import BY, ESTIMATED, MEASURED, Figures, Point
from gemma4_tpu.costing.plausibility import DOUBTFUL, DOUBTFUL_FROM, IMPOSSIBLE, Judgement, NotJudged, judge, worst
from gemma4_tpu.costing.read import read
from gemma4_tpu.markdown import plain, table
from gemma4_tpu.reporting.costs import command_line, deliver, head, joined, remarks, sources

MEASURED_WRONG = 1
"""Exit code: a figure recorded as measured here is above its ceiling."""


def show_plausibility(places: Sequence[str], out: str | None) -> int:
    """Compares throughputs and latencies of all places with their ceilings. Returns `MEASURED_WRONG` or 0."""
    figures = read(places)
    command = command_line("plausibility", places, {"out": out} if out else {})
    deliver(plausibility_report(figures, command=command), out)
    judged, _ = judge(figures)
    wrong = any(one.verdict == IMPOSSIBLE and one.figure.label == MEASURED for one in judged)
    return MEASURED_WRONG if wrong else 0


def plausibility_report(figures: Figures, *, command: str | None = None) -> str:
    """The report: every throughput and latency compared with its ceiling, with the arithmetic."""
    judged, left = judge(figures)
    parts = [head("Throughputs and latencies compared with the slice's ceiling", command), _ceiling_rules(judged)]
    return joined([*parts, _judged(judged), _arithmetic(judged), _left(left), remarks(figures.remarks)])


def _ceiling_rules(judged: Sequence[Judgement]) -> Iterator[str]:
    above = sum(one.verdict == IMPOSSIBLE for one in judged)
    yield f"{len(judged)} figures, {above} of them above what the slice could do: **impossible** as stated. Figures"
    yield f"above {DOUBTFUL_FROM:.0%} are **doubtful** (an assumption: whole models seldom get so near a chip's peaks)."
    yield ""
    yield "Ceilings are *estimated* from published peaks (`gemma4_tpu/hardware.py`) and the model's arithmetic, on the"
    yield "assumptions of `gemma4_tpu/costing/ceiling.py`, all of which favour speed: prompts cost FLOPs, generated"
    yield "tokens cost reads of weights and KV cache, and nothing else costs anything. Prompts found in a prefix cache"
    yield "are not processed and have no ceiling, which can explain a figure above 100%."
    yield ""


def _judged(judged: Sequence[Judgement]) -> Iterator[str]:
    rows = []
    for one in judged:
        verdict = one.verdict if one.verdict not in (IMPOSSIBLE, DOUBTFUL) else f"**{one.verdict}**"
        share = f"{one.share:.0%}" if one.share < 1e6 else "–"
        rows.append(
            [one.figure.name, BY[one.figure.label], one.quantity, one.told, one.limit, one.bound_by, share, verdict]
        )
    yield from table(["figure", "", "quantity", "stated", "ceiling", "bound by", "share", "verdict"], rows)
    yield from sources([one.figure for one in judged])


def _arithmetic(judged: Sequence[Judgement]) -> Iterator[str]:
    yield from ["## Arithmetic", ""]
    for one in sorted(judged, key=lambda each: -each.share):
        yield f"- {one.figure.name}, {one.quantity} (**{one.verdict}**): {one.arithmetic}."
        if isinstance(one.figure, Point) and one.figure.note and one is worst(judged, one.figure):
            yield f"  {one.figure.note.strip()}"
    yield ""


def _left(left: Sequence[NotJudged]) -> Iterator[str]:
    if left:
        yield from ["## Not judged", "", *(f"- {one.figure.name}: {one.reason}" for one in left), ""]


def nearest_to_ceiling(figures: Figures) -> Iterator[str]:
    """Whether the slice can have done what is reported: figures too close to their ceiling, or above it."""
    judged, left = judge(figures)
    if not judged:
        reasons = "; ".join(dict.fromkeys(one.reason for one in left)) or "no throughput is recorded"
        yield from ["### Compared with the slice's ceiling", "", f"Not judged: {plain(reasons)}.", ""]
        return
    nearest = max(judged, key=lambda one: one.share)
    yield from ["### Compared with the slice's ceiling", ""]
    by = BY[ESTIMATED]
    yield f"Throughputs and latencies compared with it ({by} from published peaks): {len(judged)}. The closest:"
    yield f"{plain(nearest.figure.name)}, {nearest.quantity}, {nearest.told} with a limit of {nearest.limit},"
    yield from [f"{nearest.share:.0%}: **{nearest.verdict}**.", ""]
    odd = [one for one in judged if one.verdict in (IMPOSSIBLE, DOUBTFUL)]
    if odd:
        rows = [[plain(one.figure.name), BY[one.figure.label], one.quantity, one.told, one.limit,
                 f"{one.share:.0%}", one.verdict] for one in odd]  # fmt: skip
        yield from table(["figure", "by", "quantity", "stated", "ceiling", "share", "verdict"], rows)
