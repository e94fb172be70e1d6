"""Estimates in words: both ends of a band, never a point."""

from __future__ import annotations

from collections.abc import Mapping


def band(values: Mapping[str, float], form: str = "{:,.0f}", times: float = 1.0) -> str:
    """`8,000 to 11,000`: from the smaller of `low` and `high` to the larger; one figure where both read alike.

    Args:
      values: at `low` and `high`.
      form: of one figure.
      times: a factor on them.
    """
    ends = [form.format(value * times) for value in sorted((values["low"], values["high"]))]
    return " to ".join(dict.fromkeys(ends))


def usd_per_million(middle: float | None, seconds: Mapping[str, float]) -> dict[str, float] | None:
    """Dollars per million real tokens at both ends; None: no price is known.

    Args:
      middle: those at `mid`.
      seconds: of an update at `low`, `mid` and `high` (`PlanResult.seconds_per_update`).
    """
    return None if middle is None else {end: middle * seconds[end] / seconds["mid"] for end in seconds}
