"""Figures as `--json` prints them: without the noise of binary sums, and without losing what is small.

Dollars have six places, and a sum below a dollar six digits; milliseconds and seconds three places; shares, rates and
factors four.
"""

from __future__ import annotations

import math
from typing import Any

_DOLLARS = {
    "spent", "overhead", "saved", "saved_coalesced", "without_cache", "cost_per_request", "cost_difference", "dollars",
}  # fmt: skip
_SECONDS = ("_ms", "seconds")
_OF_AN_INTERVAL = ("estimate", "low", "high")


def dollars(amount: float) -> float:
    """Return a sum of money, rounded."""
    return round(amount, max(6, 5 - math.floor(math.log10(abs(amount)))) if amount else 6)


def rounded(value: Any, name: str = "") -> Any:
    """Return a report's JSON with its floats rounded by their names; an interval's are those of what it is of."""
    if isinstance(value, dict):
        return {key: rounded(one, name if key in _OF_AN_INTERVAL else key) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one, name) for one in value]
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    return dollars(value) if name in _DOLLARS else round(value, 3 if name.endswith(_SECONDS) else 4)
