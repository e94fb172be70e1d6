"""Figures from which costs and ceilings are computed: training runs, load-test points, evaluations, and their
sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.costing.ceiling import ModelDemand, Serving
from gemma4_tpu.prices import ON_DEMAND

MEASURED, ESTIMATED, QUOTED, GIVEN = LABELS = ("measured", "estimated", "quoted", "given")
ENDPOINT = "endpoint"
"""The slice of another server's output: unknown, and shared with its other clients."""
BY = {label: f"*{label}*" for label in LABELS}
"""How a page marks the kind of a figure."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Common to every figure."""

    name: str
    label: str
    """One of `LABELS`."""
    source: str
    """Folder, or who is quoted."""
    slice: str
    """Key of `hardware.SLICES`, `local` or `ENDPOINT`."""
    system: str | None = None
    """Training and serving of one system are added up; None: with those of any."""


@dataclass(frozen=True, kw_only=True)
class Training(Figure):
    """A training run, recorded or planned."""

    hours: float
    """All paid hours, as far as known; the middle of a range."""
    band: tuple[float, float] | None = None
    """Bounds as factors of these hours; None: they are exact."""
    real_tokens: float | None = None
    """Non-padding tokens trained on."""
    real_tokens_per_second: float | None = None
    """Over all chips; excludes compilation and evaluations where the source does."""
    usd_per_hour: float | None = None
    """The price set by its own configuration; None: none."""
    kind: str = ON_DEMAND
    """Kind of capacity that it ran (or will run) on: one of `prices.KINDS`."""
    region: str | None = None
    """Region whose prices apply; None: the first that is known."""
    model: ModelDemand | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    mean_tokens: float = 1.0
    """Mean length of its examples in tokens; 1 if unknown, which gives the highest ceiling."""


@dataclass(frozen=True, kw_only=True)
class Point(Figure):
    """A server under one load. Unknown figures are None."""

    serving: Serving | None = None
    """None: no ceiling is known (a CPU, for example)."""
    input_tokens: float | None = None
    """Of one request."""
    output_tokens: float | None = None
    sequences: float | None = None
    """The most that can be in progress at a time."""
    output_tokens_per_second: float | None = None
    """Generated."""
    whole: bool = False
    """The rate is a mean over whole requests, not a peak: prompts were processed in the same time."""
    prompt_tokens_per_second: float | None = None
    """Prompt tokens processed, none of them cached."""
    ttft_seconds: float | None = None
    """Time to first token."""
    tpot_seconds: float | None = None
    """Time per output token after the first."""
    note: str = ""

    @property
    def total_tokens_per_second(self) -> float | None:
        """Prompts and answers, where lengths and rate are known."""
        if not (self.output_tokens_per_second and self.output_tokens) or self.input_tokens is None:
            return None
        return self.output_tokens_per_second * (self.input_tokens + self.output_tokens) / self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Evaluation(Figure):
    """Problems given to a model, and the number of samples that pass."""

    seconds: float | None = None
    """Of generation."""
    tokens: float | None = None
    """Generated."""
    samples: int
    passing: float
    """Samples that pass."""
    model: ModelDemand | None = None
    """None: not known."""


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A number printed in a source, and the figure it should equal."""

    where: str
    """Section or table."""
    what: str
    printed: str
    """As printed, without unit: its decimals give its precision."""
    of: str | None = None
    """A named figure (see `cost.named`)."""
    ratio: tuple[str, str] | None = None
    """One over the other."""
    saving: tuple[str, str] | None = None
    """By how many percent the first is below the second."""
    note: str = ""
    """Shown if it differs."""


@dataclass(kw_only=True)
class Figures:
    """A set of them."""

    trainings: list[Training] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    printed: list[Printed] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What a reader of the throughputs should know, a sentence or two each."""
    cost_remarks: list[str] = field(default_factory=list)
    """What a reader of the costs should know."""

    @classmethod
    def together(cls, sets: Iterable[Figures]) -> Figures:
        """One set of several."""
        total = cls()
        for one in sets:
            for name in cls.__dataclass_fields__:
                getattr(total, name).extend(getattr(one, name))
        return total
