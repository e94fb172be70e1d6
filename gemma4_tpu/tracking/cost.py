"""Dollars from seconds. Prices come from `prices.py` or `hardware.usd_per_hour`."""

from __future__ import annotations


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
