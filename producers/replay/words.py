"""Numbers as a person reads them in the report, the bar and the plot."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one: `1 request`, `2,000 requests`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def per_second(rate: float) -> str:
    """Return a rate without its unit: whole from 10 on, two digits that count below, so that 0.04 is not 0."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"
