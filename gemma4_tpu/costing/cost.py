"""Cost of a training run, per million real tokens, per million served tokens, per solved problem, and in total."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gemma4_tpu.costing.figures import Evaluation, Figures, Point, Printed, Training
from gemma4_tpu.hardware import SLICES
from gemma4_tpu.prices import ON_DEMAND, SPOT, Price, slice_price, usd, usd_per_million_tokens


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Hourly prices of slices: given prices take precedence over configured ones, and these over `prices.yaml`."""

    on_demand: Mapping[str, float] = field(default_factory=dict)
    """Slice → given USD per hour."""
    spot: Mapping[str, float] = field(default_factory=dict)

    def of(self, slice_: str, kind: str, training: Training | None = None) -> Price | None:
        """The price of one kind; None: unknown.

        Args:
          slice_: key of `hardware.SLICES`, or `local`.
          kind: one of `prices.KINDS`.
          training: a training run whose configuration may set price and region.
        """
        given = {ON_DEMAND: self.on_demand, SPOT: self.spot}.get(kind, {})
        if slice_ in given:
            return Price(usd_per_hour=given[slice_], date="this report", source="given")
        if training is not None and training.usd_per_hour is not None and kind == training.kind:
            return Price(usd_per_hour=training.usd_per_hour, date=f"of {training.name}", source=training.source)
        known = SLICES.get(slice_)
        return None if known is None else slice_price(known, kind, training.region if training else None)

    def hourly(self, slice_: str, kind: str, training: Training | None = None) -> float | None:
        """The price in USD per hour."""
        price = self.of(slice_, kind, training)
        return None if price is None else price.usd_per_hour


def training_usd(training: Training, prices: Prices, kind: str) -> float | None:
    """Cost of the whole training run."""
    return usd(training.hours * 3600, prices.hourly(training.slice, kind, training))


def training_usd_per_million(training: Training, prices: Prices, kind: str) -> float | None:
    """Cost per million real tokens trained; None if price or tokens are unknown."""
    total = training_usd(training, prices, kind)
    return None if total is None or not training.real_tokens else total / training.real_tokens * 1e6


def generated_usd_per_million(point: Point, prices: Prices, kind: str) -> float | None:
    """Cost per million generated tokens, at this rate around the clock; prompts count as free."""
    return usd_per_million_tokens(prices.hourly(point.slice, kind), point.output_tokens_per_second)


def total_usd_per_million(point: Point, prices: Prices, kind: str) -> float | None:
    """Cost per million tokens, prompts and answers together."""
    return usd_per_million_tokens(prices.hourly(point.slice, kind), point.total_tokens_per_second)


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Cost of an evaluation's samples."""

    usd: float
    usd_per_pass: float | None
    """Cost of all samples divided by the number that pass: the cost of a solution by repeated sampling; None: none."""
    by: str
    """Basis of the cost."""


def _loads_of(evaluation: Evaluation, figures: Figures) -> list[Point]:
    """The loads whose rates can apply to an evaluation: those of its system, and of its model as far as it is known."""
    found = [p for p in figures.points if None in (p.system, evaluation.system) or p.system == evaluation.system]
    sizes = {p.serving.model.parameters for p in found if p.serving}
    if evaluation.model is None:
        return found if len(sizes) < 2 else []
    return [p for p in found if p.serving is None or p.serving.model.parameters == evaluation.model.parameters]


def solved(evaluation: Evaluation, figures: Figures, prices: Prices, kind: str) -> Solved | None:
    """The cost from the slice's price and the time, else from the tokens at the cheapest load of the model; None:
    neither is known.
    """
    hourly = prices.hourly(evaluation.slice, kind)
    cost = None if evaluation.seconds is None else usd(evaluation.seconds, hourly)
    by = f"generation time on {evaluation.slice}"
    if cost is None and evaluation.tokens:
        served = [
            (rate, p.name)
            for p in _loads_of(evaluation, figures)
            if (rate := generated_usd_per_million(p, prices, kind))
        ]
        if served:
            rate, name = min(served)
            cost, by = evaluation.tokens / 1e6 * rate, f"its generated tokens at the price of {name} (estimated)"
    if cost is None:
        return None
    return Solved(usd=cost, usd_per_pass=cost / evaluation.passing if evaluation.passing else None, by=by)


@dataclass(frozen=True, kw_only=True)
class Together:
    """One training run, and serving on one slice."""

    name: str
    """Name of the system, else of the training run."""
    training: Training
    slice: str

    def usd(self, serving_hours: float, prices: Prices, kind: str) -> float | None:
        """Cost of the training run plus this many hours of serving."""
        trained = training_usd(self.training, prices, kind)
        served = usd(serving_hours * 3600, prices.hourly(self.slice, kind))
        return None if trained is None or served is None else trained + served


def together(figures: Figures, slices: Sequence[str] = ()) -> list[Together]:
    """Every training run with every slice of its system's loads, and with `slices`."""
    pairs: dict[tuple[str, str], Together] = {}
    for training in figures.trainings:
        served = [p.slice for p in figures.points if None in (p.system, training.system) or p.system == training.system]
        for name in dict.fromkeys([*served, *slices]):
            known = Together(name=training.system or training.name, training=training, slice=name)
            pairs[training.name, name] = known
    return list(pairs.values())


def named(
    figures: Figures, prices: Prices, hours: Sequence[float], slices: Sequence[str] = (), *, rounded: bool = False
) -> dict[str, float]:
    """Every on-demand figure of the report by name; dollars unless the name says otherwise.

    `rounded`: calculate with rounded figures, as people do with printed ones: trained tokens in millions with one
    decimal, tokens per hour in millions with two, dollars per million in cents.
    """
    return {name: value for name, value in _named(figures, prices, hours, slices, rounded) if value is not None}


def _named(
    figures: Figures, prices: Prices, hours: Sequence[float], slices: Sequence[str], rounded: bool
) -> Iterator[tuple[str, float | None]]:
    for training in figures.trainings:
        start = f"training/{training.name}"
        price = training_usd_per_million(training, prices, ON_DEMAND)
        total = training_usd(training, prices, ON_DEMAND)
        if rounded and total is not None and training.real_tokens:
            price = round(total / round(training.real_tokens / 1e6, 1), 2)
        yield f"{start}/usd_per_hour", prices.hourly(training.slice, ON_DEMAND, training)
        yield f"{start}/hours", training.hours
        yield f"{start}/real_tokens_per_second", training.real_tokens_per_second
        yield f"{start}/usd", total
        yield f"{start}/usd_per_million_real_tokens", price
    for point in figures.points:
        start, rate = f"serving/{point.name}", point.output_tokens_per_second
        hourly, millions = prices.hourly(point.slice, ON_DEMAND), rate and rate * 3600 / 1e6
        price = generated_usd_per_million(point, prices, ON_DEMAND)
        if rounded and hourly is not None and millions:
            price = round(hourly / round(millions, 2), 2)
        yield f"{start}/usd_per_hour", hourly
        yield f"{start}/million_tokens_per_hour", millions
        yield f"{start}/usd_per_million_generated", price
    for pair in together(figures, slices):
        for number in hours:
            yield f"total/{pair.name}/{number:g} h", pair.usd(number, prices, ON_DEMAND)


YES, ROUNDED, NO = "yes", "rounded", "no"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A printed number and the value that follows from its inputs."""

    printed: Printed
    value: float | None
    """None: the figure is missing."""
    after_rounding: float | None
    """The value from figures rounded along the way (see `named`)."""

    @property
    def shown(self) -> str:
        """The value with as many decimals as the printed one."""
        return self._decimals(self.value)

    @property
    def agrees(self) -> str:
        """`YES`; `ROUNDED`: it follows if figures are rounded along the way; or `NO`."""
        if self.shown == self.printed.printed:
            return YES
        return ROUNDED if self._decimals(self.after_rounding) == self.printed.printed else NO

    def _decimals(self, value: float | None) -> str:
        return "unknown" if value is None else f"{value:.{len(self.printed.printed.partition('.')[2])}f}"


def compare(figures: Figures, prices: Prices, hours: Sequence[float], slices: Sequence[str] = ()) -> list[Compared]:
    """Each number that the sources print, with its figure from `named`."""
    known, rounded = (named(figures, prices, hours, slices, rounded=rounded) for rounded in (False, True))
    return [Compared(printed=p, value=_value(p, known), after_rounding=_value(p, rounded)) for p in figures.printed]


def _value(printed: Printed, known: Mapping[str, float]) -> float | None:
    pair = printed.ratio or printed.saving
    if pair is None:
        return known.get(printed.of or "")
    left, right = (known.get(name) for name in pair)
    if left is None or not right:
        return None
    return left / right if printed.ratio else 100 * (1 - left / right)
