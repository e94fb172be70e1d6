"""Compares throughputs and latencies with the slice's physical ceiling: a figure above it cannot be right as
reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gemma4_tpu.costing import ceiling
from gemma4_tpu.costing.ceiling import Ceiling, DoesNotFit
from gemma4_tpu.costing.figures import Figure, Figures, Point, Training
from gemma4_tpu.hardware import SLICES

IMPOSSIBLE, DOUBTFUL, POSSIBLE = "impossible", "doubtful", "possible"
DOUBTFUL_FROM = 0.7
"""Share of a ceiling above which a figure needs an explanation: whole models seldom get this close to a chip's
peaks.
"""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One figure compared with its ceiling."""

    figure: Figure
    quantity: str
    told: str
    """The figure with its unit."""
    limit: str
    """The ceiling, in the same unit."""
    share: float
    """Share of the ceiling; infinite if the model does not fit at all."""
    bound_by: str
    arithmetic: str

    @property
    def verdict(self) -> str:
        if self.share > 1:
            return IMPOSSIBLE
        return DOUBTFUL if self.share > DOUBTFUL_FROM else POSSIBLE


class NotJudged(NamedTuple):
    """A figure without a ceiling."""

    figure: Figure
    reason: str


def judge(figures: Figures) -> tuple[list[Judgement], list[NotJudged]]:
    """Every figure that has a ceiling, and why the others have none."""
    judged: list[Judgement] = []
    left: list[NotJudged] = []
    every: list[Training | Point] = [*figures.trainings, *figures.points]
    for figure in every:
        found = list(_training(figure) if isinstance(figure, Training) else _point(figure))
        judged += found
        if not found:
            left.append(NotJudged(figure, _why_not(figure)))
    return judged, left


def _why_not(figure: Training | Point) -> str:
    if figure.slice not in SLICES:
        return f"no peaks are known for {figure.slice}"
    if isinstance(figure, Training):
        return "no throughput given" if not figure.real_tokens_per_second else "the model's architecture is not known"
    return "no model or slice given" if figure.serving is None else "no throughput or latency given"


def _training(training: Training) -> Iterator[Judgement]:
    slice_, rate = SLICES.get(training.slice), training.real_tokens_per_second
    if slice_ is None or not rate or training.model is None or training.model.arch is None:
        return
    least = ceiling.train(training.model, slice_, training.lora, training.mean_tokens)
    yield _rate(training, "real tokens trained", rate, least)


def _point(point: Point) -> Iterator[Judgement]:
    serving = point.serving
    if serving is None:
        return
    prompt = point.input_tokens or 1.0
    try:
        step = ceiling.decode(serving, prompt, 1)
    except DoesNotFit as reason:
        yield Judgement(
            figure=point, quantity="anything at all", told="served", limit="nothing", share=math.inf, bound_by="HBM",
            arithmetic=f"does not fit: {reason}",
        )  # fmt: skip
        return
    if rate := point.output_tokens_per_second:
        if point.whole and point.output_tokens:
            least = ceiling.served(serving, prompt, point.output_tokens, point.sequences)
            yield _rate(point, "tokens generated, prompts processed too", rate, least)
        else:
            yield _rate(point, "tokens generated", rate, ceiling.decode(serving, prompt, point.sequences))
    if rate := point.prompt_tokens_per_second:
        yield _rate(point, "prompt tokens processed", rate, ceiling.prefill(serving, prompt))
    if (seconds := point.ttft_seconds) and point.input_tokens:
        least = ceiling.prefill(serving, point.input_tokens, one_request=True)
        yield _latency(point, "time to first token", seconds, least.seconds, least)
    if seconds := point.tpot_seconds:
        yield _latency(point, "time per output token", seconds, step.seconds / step.tokens, step)


def _rate(figure: Figure, what: str, rate: float, least: Ceiling) -> Judgement:
    most = least.tokens_per_second
    share = rate / most
    told, limit = f"{rate:,.0f} tokens/s", f"{most:,.0f} tokens/s"
    return Judgement(
        figure=figure, quantity=what, told=told, limit=limit, share=share, bound_by=least.bound_by,
        arithmetic=f"{least.arithmetic} for {least.tokens:,.7g} token(s), at most {limit};"
        f" {told} stated is {share:.0%}",
    )  # fmt: skip


def _latency(figure: Figure, what: str, seconds: float, shortest: float, least: Ceiling) -> Judgement:
    share = shortest / seconds
    told, limit = f"{seconds * 1e3:,.4g} ms", f"{shortest * 1e3:,.3g} ms"
    return Judgement(
        figure=figure, quantity=what, told=told, limit=limit, share=share, bound_by=least.bound_by,
        arithmetic=f"{least.arithmetic} for {least.tokens:,.7g} token(s), at least {limit};"
        f" {told} stated is {share:.0%} of peak speed",
    )  # fmt: skip


def worst(judged: Sequence[Judgement], figure: Figure) -> Judgement | None:
    """The judgement of a figure that is closest to (or farthest above) its ceiling."""
    return max((one for one in judged if one.figure is figure), key=lambda one: one.share, default=None)
