"""Percentiles and confidence intervals, against published examples."""

from __future__ import annotations

import pytest

from workers.intervals import Ratio, Sums, means, percentile, proportions, student, widened, wilson

BOUNDS = (1, 2, 5)


def test_a_percentile_is_linear_within_its_bucket() -> None:
    counts = (0, 10, 10, 0)  # ten from 1 to 2, ten from 2 to 5
    assert [percentile(counts, BOUNDS, q) for q in (0.25, 0.5, 0.75, 1.0)] == [1.5, 2.0, 3.5, 5.0]
    assert percentile((4, 0, 0, 0), BOUNDS, 0.5) == 0.5


def test_what_lies_above_every_bound_is_told_as_the_last() -> None:
    assert percentile((1, 0, 0, 99), BOUNDS, 0.95) == 5


def test_nothing_has_no_percentile() -> None:
    assert percentile((0, 0, 0, 0), BOUNDS, 0.5) is None
    assert percentile((), BOUNDS, 0.5) is None


def test_wilsons_interval() -> None:  # Newcombe, Statistics in Medicine 17, 857-872, table I
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_newcombes_interval() -> None:  # the same volume, 873-890, table II, method 10
    found = proportions((48, 80), (56, 70))
    assert found is not None
    assert (found.estimate, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert found.clear
    close = proportions((5, 56), (0, 29))
    assert close is not None
    assert (close.low, close.high) == pytest.approx((-0.1926, 0.0381), abs=5e-5)
    assert not close.clear
    assert proportions((0, 0), (1, 1)) is None


def test_students_quantile() -> None:
    assert [student(n) for n in (10, 30, 100)] == pytest.approx([2.2281, 2.0423, 1.9840], abs=1e-4)


def sums(count: int, mean: float, variance: float) -> Sums:
    return Sums(count, count * mean, (count - 1) * variance + count * mean * mean)


def test_welchs_interval() -> None:
    base, other = sums(15, 20.8, 7.9), sums(15, 23.0, 3.8)
    assert (base.mean, base.variance) == pytest.approx((20.8, 7.9))
    found = means(base, other)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.estimate == pytest.approx(2.2)
    assert (found.low, found.high) == pytest.approx((0.381, 4.019), abs=2e-3)  # t of 25.0 degrees is 2.0595


def hours(*pairs: tuple[float, float]) -> Ratio:
    """Return the ratio of hours that each counted x of n."""
    return Ratio(
        len(pairs), sum(x for x, _ in pairs), sum(n for _, n in pairs), sum(x * x for x, _ in pairs),
        sum(x * n for x, n in pairs), sum(n * n for _, n in pairs),
    )  # fmt: skip


def test_hours_that_differ_widen_an_interval() -> None:
    steady, jumpy = hours(*[(60, 100)] * 12), hours(*[(20, 100), (100, 100)] * 6)
    found = proportions((720, 1200), (720, 1200))
    assert found is not None
    assert steady.variance == pytest.approx(0.0)
    assert jumpy.variance == pytest.approx(12 * 1600 / 1200**2 * 12 / 11)  # each hour 40 off; of the mean of twelve
    assert widened(found, steady, steady) == found
    wide = widened(found, steady, jumpy)
    assert wide is not None
    spread = student(11) * jumpy.variance**0.5
    assert (wide.low, wide.high) == pytest.approx((-spread, spread))
    assert widened(found, hours(*[(20, 100), (100, 100)] * 5), jumpy) == found  # ten hours are too few


def test_too_few_values_have_a_difference_and_no_interval() -> None:
    for base, other in (
        (sums(1, 1.0, 0.0), sums(50, 2.0, 1.0)),
        (sums(3, 1.0, 1.0), sums(3, 2.0, 1.0)),
        (sums(50, 1.0, 0.0), sums(50, 2.0, 0.0)),
    ):
        found = means(base, other)
        assert found is not None
        assert found.estimate == pytest.approx(1.0)
        assert found.low is found.high is None
        assert not found.clear
    assert means(sums(0, 0.0, 0.0), sums(5, 2.0, 1.0)) is None
