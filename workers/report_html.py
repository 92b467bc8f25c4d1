"""The report as one self-contained page: no script, no request to anywhere, light or dark as its reader prefers."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from shared.touches import TIERS
from workers import report_charts as charts
from workers import report_words as words
from workers.account import Line
from workers.report import Report
from workers.report_table import notes

_GROUPS = ("model", "profile", "tenant")
#: What the template calls as a filter.
_WORDS = (
    words.dollars, words.share, words.duration, words.tokens, words.factor, words.points, words.dearer,
    words.per_thousand,
)  # fmt: skip


def render(report: Report, now: datetime | None = None) -> str:
    """Return the page. `report` needs the groups of its tables, `experiment`, and `report_charts.bucket`'s."""
    environment = Environment(
        loader=PackageLoader("workers", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {word.__name__: word for word in _WORDS}
    return environment.get_template("report.html.j2").render(_page(report), now=now or datetime.now(UTC))


def _page(report: Report) -> dict[str, Any]:
    by, names = charts.buckets(report.window)
    lines = report.groups[by]
    spans, decades = charts.latencies(report.tiers)
    return {
        "report": report,
        "total": report.total,
        "names": words.TIER_NAMES,
        "bucket": by,
        "answered": charts.columns(lines, names, TIERS, lambda line, tier: line.tiers.get(tier, 0), words.tokens),
        "money": charts.columns(lines, names, ("spent", "saved"), _dollars, words.round_dollars),
        "spans": spans,
        "decades": decades,
        "most_saved": max((tier.saved for tier in report.tiers), default=0.0),
        "groups": {one: report.groups[one] for one in _GROUPS if len(report.groups[one]) > 0},
        "experiments": [
            (name, found, charts.forest(found, lambda v: v.hit_rate_difference))
            for name, found in (
                (name, list(rows)) for name, rows in groupby(report.variants, key=lambda variant: variant.experiment)
            )
        ],
        "most_hits": max((key.hits for key in report.top), default=1),
        "notes": notes(report),
    }


def _dollars(line: Line, kind: str) -> float:
    return line.spent if kind == "spent" else line.saved
