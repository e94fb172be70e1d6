"""Figures that costs and ceilings are computed from: training runs, points of a load, evaluations, and who says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gemma4_tpu.config.schema import LoraConfig
from gemma4_tpu.costing.ceiling import ModelDemand, Serving
from gemma4_tpu.prices import ON_DEMAND

MEASURED, ESTIMATED, QUOTED, GIVEN = LABELS = ("measured", "estimated", "quoted", "given")
ENDPOINT = "endpoint"
"""The slice of what another server generated: not known, and shared with whoever else it answered."""
BY = {label: f"*{label}*" for label in LABELS}
"""How a page marks who says so."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What every figure says about itself."""

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
    """All of it that is paid for, as far as it is known; of a range the middle."""
    band: tuple[float, float] | None = None
    """From how many to how many times these hours it may be; None: they are known."""
    real_tokens: float | None = None
    """Non-padding tokens trained on."""
    real_tokens_per_second: float | None = None
    """Over all chips; with compilation and evaluations left out where the source does."""
    usd_per_hour: float | None = None
    """The price in its own configuration; None: none."""
    kind: str = ON_DEMAND
    """Of the capacity that it ran (or will run) on: one of `prices.KINDS`."""
    region: str | None = None
    """Whose prices count; None: the first that is known."""
    model: ModelDemand | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    mean_tokens: float = 1.0
    """Mean length of its examples in tokens; 1 where it isn't known, for which a ceiling is highest."""


@dataclass(frozen=True, kw_only=True)
class Point(Figure):
    """A server under one load. A figure that isn't told is None."""

    serving: Serving | None = None
    """None: no ceiling is known (a CPU, say)."""
    input_tokens: float | None = None
    """Of one request."""
    output_tokens: float | None = None
    sequences: float | None = None
    """The most that can be under way at a time."""
    output_tokens_per_second: float | None = None
    """Generated."""
    whole: bool = False
    """The rate is a mean over whole requests, not a peak: the prompts were processed in the same time."""
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
    """Problems that a model was given, and how many of its samples pass."""

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
    """A number that a source prints, and which figure it should be."""

    where: str
    """Section or table."""
    what: str
    printed: str
    """As printed, without unit: its decimals say how exact it is."""
    of: str | None = None
    """A named figure (see `cost.named`)."""
    ratio: tuple[str, str] | None = None
    """One over the other."""
    saving: tuple[str, str] | None = None
    """By how many percent the first is below the second."""
    note: str = ""
    """Said where it differs."""


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
