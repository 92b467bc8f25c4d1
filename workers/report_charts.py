"""The geometry of the page's charts: numbers in, percent of a width or height out. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from workers.account import Line
from workers.comparison import Variant
from workers.intervals import Difference
from workers.report import Tier, Window

#: Up to so many hours a chart over time has a column for each; beyond, one for each day.
_HOURLY = 72
_LABELS = 5
#: The latency axis: powers of ten from 0.1 ms on, at least up to a second.
_FASTEST, _SLOWEST = 0.1, 1000.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A label on an axis, `at` percent of it."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a column: `y` and `height` in percent from the top, its series, and what a pointer is told."""

    kind: str
    y: float
    height: float
    told: str


@dataclass(frozen=True, slots=True)
class Columns:
    """A chart of stacked columns over time."""

    columns: list[list[Block]]
    kinds: list[str]
    across: list[Mark]
    up: list[Mark]


@dataclass(frozen=True, slots=True)
class Span:
    """A line from `low` to `high` with a dot at `dot`, percent of the width."""

    low: float
    dot: float
    high: float


def bucket(window: Window) -> Literal["hour", "day"]:
    """Return what a chart over this window has a column for."""
    return "hour" if window.until - window.since <= timedelta(hours=_HOURLY) else "day"


def buckets(window: Window) -> tuple[str, list[str]]:
    """Return `hour` or `day` and the names of all of the window's, those without a request too."""
    by = bucket(window)
    step, form = (timedelta(hours=1), "%Y-%m-%d %H:00") if by == "hour" else (timedelta(days=1), "%Y-%m-%d")
    at = window.since if by == "hour" else window.since.replace(hour=0)
    names = []
    while at < window.until:
        names.append(at.strftime(form))
        at += step
    return by, names


def columns(
    lines: Sequence[Line],
    names: Sequence[str],
    kinds: Sequence[str],
    value: Callable[[Line, str], float],
    shown: Callable[[float], str],
) -> Columns:
    """Stack `value(line, kind)` of each kind, the first at the bottom, for each bucket of `names`."""
    found = {line.name: line for line in lines}
    used = [kind for kind in kinds if any(value(line, kind) > 0 for line in lines)]
    highest = max((sum(value(line, kind) for kind in used) for line in lines), default=0.0)
    top, step = axis(highest)
    stacks = []
    for name in names:
        stack, filled = [], 0.0
        for kind in used if name in found else ():
            part = value(found[name], kind)
            if part > 0:
                height = 100 * part / top
                stack.append(Block(kind, 100 - filled - height, height, f"{name}: {shown(part)}"))
                filled += height
        stacks.append(stack)
    ticks = [Mark(100 * n * step / top, shown(n * step)) for n in range(round(top / step) + 1)]
    return Columns(stacks, used, _across(names), ticks)


def axis(highest: float) -> tuple[float, float]:
    """Return the top of an axis that holds `highest`, and a round step that divides it into two to five."""
    if highest <= 0:
        return 1.0, 1.0
    size = 10 ** math.floor(math.log10(highest))
    step = next(s for s in (0.2 * size, 0.5 * size, size, 2 * size, 5 * size) if highest / s <= 5)
    return math.ceil(highest / step - 1e-9) * step, step


def _across(names: Sequence[str]) -> list[Mark]:
    every = max(1, math.ceil(len(names) / _LABELS))
    return [Mark(100 * (at + 0.5) / len(names), _spoken(names[at])) for at in range(every // 2, len(names), every)]


def _spoken(name: str) -> str:
    at = datetime.fromisoformat(name).replace(tzinfo=UTC)
    return f"{at:%-d %b}" if len(name) == len("2026-11-01") else f"{at:%a %H:%M}"


def latencies(tiers: Sequence[Tier]) -> tuple[dict[str, Span], list[Mark]]:
    """Return each tier's span from p50 to p95 on a logarithmic axis, and the axis' labels."""
    slowest = max((tier.p95_ms for tier in tiers if tier.p95_ms), default=_SLOWEST)
    decades = max(math.ceil(math.log10(slowest / _FASTEST)), round(math.log10(_SLOWEST / _FASTEST)))

    def place(ms: float) -> float:
        return 100 * min(1.0, max(0.0, math.log10(max(ms, _FASTEST) / _FASTEST) / decades))

    spans = {
        tier.tier: Span(place(tier.p50_ms), place(tier.p50_ms), place(tier.p95_ms))
        for tier in tiers
        if tier.p50_ms is not None and tier.p95_ms is not None
    }
    ticks = [_FASTEST * 10**n for n in range(decades + 1)]
    return spans, [Mark(place(ms), f"{ms:g} ms" if ms < 1000 else f"{ms / 1000:g} s") for ms in ticks]


def forest(variants: Sequence[Variant], of: Callable[[Variant], Difference | None]) -> dict[str, Span]:
    """Return the intervals of one experiment's variants on a common axis whose middle is no difference."""
    found = {variant.variant: of(variant) for variant in variants}
    known = {name: (d, d.low, d.high) for name, d in found.items() if d and d.low is not None and d.high is not None}
    widest = max((max(abs(low), abs(high)) for _, low, high in known.values()), default=0.0) * 1.1 or 1.0

    def place(value: float) -> float:
        return 50 + 50 * value / widest

    return {name: Span(place(low), place(d.estimate), place(high)) for name, (d, low, high) in known.items()}
