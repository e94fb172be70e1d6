"""`python -m gemma4_tpu.report prices`: the price of an hour on each chip, by region and kind, and its age."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from gemma4_tpu.hardware import CHIPS, SLICES, option_name
from gemma4_tpu.markdown import table
from gemma4_tpu.prices import FLEX_START, KINDS, Price, age_days, chip_prices, spoken
from gemma4_tpu.reporting.costs import UNKNOWN


def show_price_list() -> int:
    """Prints every built-in price and its age. Returns 0."""
    print(price_list(datetime.date.today()), end="")
    return 0


def price_list(today: datetime.date) -> str:
    """The prices of `prices.yaml` as Markdown: a table for each generation, then the sources with their age."""
    return "\n".join(_lines(today)) + "\n"


def _lines(today: datetime.date) -> Iterator[str]:
    yield from [
        "# Prices",
        "",
        "USD per chip and hour (GPUs with their share of the host), from `gemma4_tpu/prices.yaml`.",
        "",
    ]
    sources: dict[str, Price] = {}
    for chip in CHIPS:
        found = chip_prices(chip)
        sources |= {price.source: price for price in found.values()}
        slices = ", ".join(option_name(one.name) for one in SLICES.values() if one.chip.name == chip)
        yield from [f"## {chip}", "", f"hardware={slices}", ""]
        if not found:
            yield from ["No price with a source is known; give `hardware.usd_per_hour`.", ""]
            continue
        rows = [
            [region, *(_usd(found.get((region, kind))) for kind in KINDS)]
            for region in dict.fromkeys(region for region, _ in found)
        ]
        heads = [spoken(kind) + ", at best" * (kind == FLEX_START) for kind in KINDS]
        yield from table(["region", *heads], rows)
    yield from ["## Sources", ""]
    for price in sources.values():
        days = age_days(price, today)
        age = "" if days is None else f", {days} days old"
        yield f"- {price.date}{age}: {price.source}"


def _usd(price: Price | None) -> str:
    return UNKNOWN if price is None else f"{price.usd_per_hour:.4g}"
