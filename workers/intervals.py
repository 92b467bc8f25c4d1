"""Estimates from stored aggregates: percentiles of a histogram, confidence intervals of differences.

Sources: the percentile interpolates as Prometheus' `histogram_quantile` does; the interval of a proportion is Wilson's
(1927), of a difference of two proportions Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, 873-890,
method 10), of a difference of two means Welch's (Biometrika 34, 1947, 28-35) with the quantile of Student's t by
Abramowitz and Stegun 26.7.5. docs/savings.md says what they assume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
#: Fewer degrees of freedom than this leave the mean of a skewed cost no honest interval.
_FEWEST_DEGREES = 10.0
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True, slots=True)
class Difference:
    """An estimated difference to the baseline and its 95 % confidence interval; None where none is honest."""

    estimate: float
    low: float | None
    high: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Sums:
    """A sample by its sums: how many values, their sum, the sum of their squares."""

    count: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """The mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """The unbiased variance; 0 of fewer than two values."""
        if self.count < 2:
            return 0.0
        return max(0.0, (self.squares - self.total * self.mean) / (self.count - 1))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of two totals, such as hits per request, with the sums over the hours (the clusters) it was counted in.

    `xx`, `xn`, `nn` are the sums of the hours' squares and products of numerator x and denominator n.
    """

    hours: int
    x: float
    n: float
    xx: float
    xn: float
    nn: float

    @property
    def variance(self) -> float:
        """The variance of the ratio if hours are independent, requests within one need not be (linearised)."""
        share = self.x / self.n
        spread = self.xx - 2 * share * self.xn + share * share * self.nn
        return max(0.0, spread) / self.n**2 * self.hours / (self.hours - 1)


def percentile(counts: Sequence[int], bounds: Sequence[float], q: float) -> float | None:
    """Return the value that a share `q` does not exceed, linear within its bucket; None of an empty histogram.

    `counts[i]` lie above `bounds[i-1]` (0 for the first) and up to `bounds[i]`. What lies in a last, unbounded bucket
    is told as its lower bound.
    """
    total = sum(counts)
    if not total:
        return None
    rank, below = q * total, 0
    for at, count in enumerate(counts):
        if count and below + count >= rank:
            lower = bounds[at - 1] if at else 0.0
            upper = bounds[at] if at < len(bounds) else math.inf
            return lower if math.isinf(upper) else lower + (upper - lower) * (rank - below) / count
        below += count
    raise AssertionError("unreachable: the ranks of a histogram end with its counts")


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion; (0, 1) of nothing."""
    if not total:
        return 0.0, 1.0
    share, square = hits / total, _Z * _Z
    centre = share + square / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    scale = 1 + square / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def proportions(base: tuple[int, int], other: tuple[int, int]) -> Difference | None:
    """Return the difference `other` - `base` of two proportions, each (hits, total); None if one is of nothing."""
    if not base[1] or not other[1]:
        return None
    p1, p2 = other[0] / other[1], base[0] / base[1]
    (l1, u1), (l2, u2) = wilson(*other), wilson(*base)
    estimate = p1 - p2
    return Difference(estimate, estimate - math.hypot(p1 - l1, u2 - p2), estimate + math.hypot(u1 - p1, p2 - l2))


def means(base: Sums, other: Sums) -> Difference | None:
    """Return the difference `other` - `base` of two means; None if one is of nothing.

    Without an interval where the samples are too small, or where neither varies.
    """
    if not base.count or not other.count:
        return None
    estimate = other.mean - base.mean
    parts = [(sample.variance / sample.count, sample.count) for sample in (base, other)]
    error = sum(part for part, _ in parts)
    if error <= 0 or min(base.count, other.count) < 2:
        return Difference(estimate, None, None)
    degrees = error**2 / sum(part**2 / (count - 1) for part, count in parts)
    if degrees < _FEWEST_DEGREES:
        return Difference(estimate, None, None)
    spread = student(degrees) * math.sqrt(error)
    return Difference(estimate, estimate - spread, estimate + spread)


def widened(found: Difference | None, base: Ratio, other: Ratio) -> Difference | None:
    """Return the difference with its interval, or a wider one that only takes hours as independent, not requests.

    The second is the ratio estimator's for clusters (Cochran, Sampling Techniques, 3rd ed., 1977, section 6.3 on), with
    Student's t; too few hours leave the interval as it is.
    """
    hours = min(base.hours, other.hours)
    if found is None or found.low is None or found.high is None or hours <= _FEWEST_DEGREES:
        return found
    spread = student(hours - 1) * math.sqrt(base.variance + other.variance)
    estimate = found.estimate
    return Difference(estimate, min(found.low, estimate - spread), max(found.high, estimate + spread))


def student(degrees: float) -> float:
    """Return the two-sided 95 % quantile of Student's t (Abramowitz and Stegun 26.7.5; 1e-4 from 10 degrees on)."""
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))
