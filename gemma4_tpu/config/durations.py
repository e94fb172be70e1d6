"""Durations as people write them."""

from __future__ import annotations

import math
import re

FORMS = "2h30m, 1d, 90s, or a number of minutes"
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_NUMBER = r"\d+(?:\.\d+)?"
_WRITTEN = re.compile("".join(rf"(?:(?P<{unit}>{_NUMBER}){unit})?" for unit in _SECONDS))


def seconds_of(text: str) -> float | None:
    """Seconds in `2h30m` (units d, h, m, s in this order) or in a bare number of minutes; None for anything else."""
    plain = text.strip().lower().replace(" ", "")
    if re.fullmatch(_NUMBER, plain):
        return 60 * float(plain)
    found = _WRITTEN.fullmatch(plain)
    if not plain or found is None:
        return None
    return math.fsum(_SECONDS[unit] * float(number) for unit, number in found.groupdict().items() if number)
