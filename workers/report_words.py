"""Figures as a person reads them, on a terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable

from workers.intervals import Difference

#: What each tier is.
TIER_NAMES = {
    "l1": "L1, worker's memory",
    "l2": "L2, Redis",
    "l3": "L3, PostgreSQL",
    "semantic": "similar question",
    "stale": "stale, being refreshed",
    "collapsed": "coalesced: joined a call",
    "llm": "computed",
}


def dollars(amount: float) -> str:
    """Return dollars with as many digits as count: `$1,234`, `$12.34`, `$0.0123`."""
    size = abs(amount)
    sign = "-" if amount < 0 else ""
    if size >= 1000:
        return f"{sign}${size:,.0f}"
    if size >= 1 or size == 0:
        return f"{sign}${size:,.2f}"
    places = 4 if size >= 0.001 else 1 - math.floor(math.log10(size))
    return f"{sign}${size:.{places}f}"


def round_dollars(amount: float) -> str:
    """Return dollars as an axis has them: without cents where they are none."""
    return f"${amount:,.0f}" if amount == round(amount) else dollars(amount)


def per_thousand(amount: float) -> str:
    """Return the dollars of a thousand requests, from those of one."""
    return dollars(amount * 1000)


def share(part: float) -> str:
    """Return a share as a percentage."""
    return f"{part:.1%}"


def duration(ms: float | None) -> str:
    """Return milliseconds in the unit that suits them; a dash for none."""
    if ms is None:
        return "–"
    if ms < 1:
        return "< 1 ms"  # the server's clock tells no more
    if ms < 10:
        return f"{ms:.1f} ms"
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def tokens(number: float) -> str:
    """Return a large count in thousands, millions or billions."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if number >= size:
            return f"{number / (1e3 if unit == 'K' else size):,.{0 if unit == 'K' else 1}f} {unit}"
    return f"{number:,.0f}"


def factor(number: float | None) -> str:
    """Return a factor; a dash for none."""
    return "–" if number is None else f"{number:,.2f}×"


def points(difference: Difference | None) -> str:
    """Return a difference of shares in percentage points, with its interval."""
    return _with_interval(difference, lambda value: f"{value * 100:+.1f}", " pp")


def dearer(difference: Difference | None) -> str:
    """Return a difference of dollars per request as of a thousand, with its interval."""
    return _with_interval(difference, lambda value: ("+" if value >= 0 else "") + dollars(value * 1000), "")


def _with_interval(difference: Difference | None, shown: Callable[[float], str], unit: str) -> str:
    if difference is None:
        return "–"
    if difference.low is None or difference.high is None:
        return f"{shown(difference.estimate)}{unit} (too few)"
    return f"{shown(difference.estimate)}{unit} ({shown(difference.low)} to {shown(difference.high)})"
