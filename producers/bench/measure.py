"""What the benchmarks share: keeping a number of calls under way, interleaving contenders, summing up rounds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

#: Does one operation; the number tells the operations of a run apart.
Operation = Callable[[int], Awaitable[object]]
#: Tells whoever watches what is being done and which fraction of the whole is behind us.
Show = Callable[[str, float], None]


async def rate(operation: Operation, concurrency: int, seconds: float) -> float:
    """Keep `concurrency` operations under way for `seconds`; return how many ended per second."""
    began = perf_counter()
    until = began + seconds
    done = 0

    async def keep_on(number: int) -> None:
        nonlocal done
        while perf_counter() < until:
            await operation(number)
            number += concurrency
            done += 1

    await asyncio.gather(*(keep_on(number) for number in range(concurrency)))
    return done / (perf_counter() - began)


async def latencies(operation: Operation, count: int, concurrency: int = 1) -> list[float]:
    """Do `count` operations, `concurrency` at once; return how long each took, in milliseconds, unordered."""
    took: list[float] = []
    numbers = iter(range(count))

    async def keep_on() -> None:
        for number in numbers:
            began = perf_counter()
            await operation(number)
            took.append((perf_counter() - began) * 1000)

    await asyncio.gather(*(keep_on() for _ in range(concurrency)))
    return took


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the nearest-rank percentile of some values; 0 when there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def rounded_percentile(values: Sequence[float], fraction: float) -> float:
    """Return the percentile as reports have it, to three decimals."""
    return round(percentile(values, fraction), 3)


def turns(names: Sequence[str], number: int) -> list[str]:
    """Return the order of the contenders in round `number`: each is first, and last, equally often."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Return median, min and max."""
    return {"median": _short(median(values)), "min": _short(min(values)), "max": _short(max(values))}


def ratios(rounds: Sequence[Mapping[str, float]], ours: str, theirs: str) -> dict[str, Any]:
    """Return the `summary` of ours / theirs, taken within each round."""
    return summary([one[ours] / one[theirs] for one in rounds])


def rounded(rounds: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return rounds as they are reported: four significant digits."""
    return [{name: _short(value) for name, value in one.items()} for one in rounds]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
