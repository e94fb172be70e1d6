"""What an hour on a slice costs, by region and kind of capacity, with date and source. Reads `prices.yaml`. No JAX."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from gemma4_tpu.config.machines import HardwareConfig
from gemma4_tpu.hardware import Slice, slice_of

ON_DEMAND, SPOT, FLEX_START = KINDS = ("on_demand", "spot", "flex_start")
"""On demand stays until it is given back; spot can be preempted; flex-start waits for room and then stays for days."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a whole slice (in `chip_prices`: a chip) costs, and who says so."""

    usd_per_hour: float
    date: str
    """As the source has it."""
    source: str
    kind: str = ON_DEMAND
    region: str | None = None
    """None: the same everywhere, or not told."""


def spoken(kind: str) -> str:
    """A kind of capacity in words: `on demand`."""
    return kind.replace("_", "-" if kind == FLEX_START else " ")


@cache
def _table() -> Mapping[str, Any]:
    text = files("gemma4_tpu").joinpath("prices.yaml").read_text(encoding="utf-8")
    table: Mapping[str, Any] = yaml.safe_load(text)
    return table


def chip_prices(chip: str) -> dict[tuple[str, str], Price]:
    """(region, kind) → price of one chip of this name, in the order of the file."""
    return dict(_chip_prices(chip))


def _chip_prices(chip: str) -> Iterator[tuple[tuple[str, str], Price]]:
    table = _table()
    flex = table["flex_start"]
    for row in table["prices"].get(chip, []):
        said = table["sources"][row.get("source", "catalogue")]
        for region in row["regions"]:
            for kind in (ON_DEMAND, SPOT):
                if kind in row:
                    price = Price(
                        usd_per_hour=row[kind], date=str(said["date"]), source=said["name"], kind=kind, region=region
                    )
                    yield (region, kind), price
            if ON_DEMAND in row:
                least = row[ON_DEMAND] * (1 - flex["discount"])
                price = Price(
                    usd_per_hour=least, date=str(flex["date"]), source=flex["name"], kind=FLEX_START, region=region
                )
                yield (region, FLEX_START), price


def regions(chip: str | None = None) -> list[str]:
    """Where this chip (None: any) has a price."""
    chips = _table()["prices"] if chip is None else [chip]
    return list(dict.fromkeys(region for name in chips for region, _ in chip_prices(name)))


def flex_start_hours() -> float:
    """How long flex-start capacity stays at most."""
    return float(_table()["flex_start"]["days"]) * 24


def slice_price(wanted: Slice, kind: str, region: str | None = None) -> Price | None:
    """What an hour on the whole slice costs.

    Args:
      wanted: the slice.
      kind: one of `KINDS`.
      region: None: the first in the file that has such a price.

    Returns:
      None where no price with a source is known.
    """
    for (where, what), price in chip_prices(wanted.chip.name).items():
        if what == kind and region in (None, where):
            return _times(price, wanted.chips)
    return None


def _times(price: Price, chips: int) -> Price:
    total = round(price.usd_per_hour * chips, 4)
    return Price(usd_per_hour=total, date=price.date, source=price.source, kind=price.kind, region=price.region)


def price_in_zone(wanted: Slice, kind: str, zone: str) -> Price | None:
    """The price in the region of a zone (`us-east5-a`), else the first that is known."""
    return slice_price(wanted, kind, zone.rpartition("-")[0]) or slice_price(wanted, kind)


def kind_of(hardware: HardwareConfig) -> str:
    """The kind of capacity that a configuration asks for."""
    if hardware.flex_start:
        return FLEX_START
    return SPOT if hardware.spot else ON_DEMAND


def price_of(hardware: HardwareConfig) -> Price | None:
    """What an hour on `hardware` costs: `hardware.usd_per_hour`, else by the table; None: unknown."""
    kind = kind_of(hardware)
    if hardware.usd_per_hour is not None:
        return Price(
            usd_per_hour=hardware.usd_per_hour, date="this run", source="hardware.usd_per_hour", kind=kind,
            region=hardware.region,
        )  # fmt: skip
    found = slice_of(hardware)
    return None if found is None else slice_price(found, kind, hardware.region)


def age_days(price: Price, today: datetime.date) -> int | None:
    """Days since its date; None where that is no day."""
    try:
        return (today - datetime.date.fromisoformat(price.date)).days
    except ValueError:
        return None


def usd(seconds: float, usd_per_hour: float | None) -> float | None:
    """Cost of the whole slice for this long; None where no price is known."""
    return None if usd_per_hour is None else seconds / 3600 * usd_per_hour


def usd_per_million_tokens(usd_per_hour: float | None, tokens_per_second: float | None) -> float | None:
    """Cost of a million tokens at this rate; None where price or rate is unknown (or the rate is 0)."""
    if usd_per_hour is None or not tokens_per_second:
        return None
    return usd_per_hour / 3600 / tokens_per_second * 1e6


def format_usd(amount: float) -> str:
    """`$12.34`, or `under $0.01`."""
    return f"${amount:,.2f}" if amount >= 0.01 or amount == 0 else "under $0.01"
