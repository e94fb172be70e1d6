"""The highest rates that keep the latency limits, for the page about a load test."""

from __future__ import annotations

from typing import Any

from gemma4_tpu.benching.rate_search import PRECISION, ROUNDS

RATE_COLUMNS = ("in", "out", "requests/s", "goodput", "output tok/s", "saturation requests/s", "saturation tok/s",
                "USD per million generated", "USD per million in and out", "trials", "above it")  # fmt: skip
"""Columns of the table."""


def rate_rows(searched: dict[str, Any]) -> list[list[str]]:
    """One row for each pair of lengths. `searched`: what `slo_outcome` returned."""
    return [_row(found) for found in searched["searches"]]


def _row(found: dict[str, Any]) -> list[str]:
    numbers = ("request_goodput", "output_throughput", "saturation_request_throughput", "saturation_output_throughput")
    dollars = ("usd_per_million_output_tokens", "usd_per_million_total_tokens")
    above = f"{found['breaks_at']:g}: {found['breaks_by']}" if found["breaks_at"] else found["breaks_by"]
    return [
        f"{found['input_tokens']:,}", f"{found['output_tokens']:,}",
        _rate(found),
        *("–" if found[key] is None else f"{found[key]:,.2f}" for key in numbers),
        *("–" if found[key] is None else f"{found[key]:,.3g}" for key in dollars),
        str(found["trials"]), above,
    ]  # fmt: skip


def _rate(found: dict[str, Any]) -> str:
    if found["rate"] is not None:
        return f"{found['rate']:g}"
    return "–" if found["breaks_at"] is None else "none"  # unknown, or known that none keeps the limits


def rate_facts(searched: dict[str, Any]) -> str:
    """States what was searched for, and how its cost is calculated."""
    limits = ", ".join(f"`{key}` ≤ {value:g}" for key, value in searched["limits"].items())
    price = searched["price"]
    told = (
        f"Dollars: {price['usd_per_hour']:,.2f} an hour on demand (*quoted*: {price['source']}, {price['date']}), over"
        " the tokens of requests that keep every limit."
        if price
        else "No price of the server is known."
    )
    return (
        f"{limits}. The rate kept them in {ROUNDS} trials of {ROUNDS}; the rate under *above it*, at most"
        f" {PRECISION:.0%} higher, did not. Goodput: requests/s that keep every limit themselves. Saturation: the"
        f" highest of any trial. {told}"
    )
