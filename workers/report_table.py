"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from workers.account import Line
from workers.comparison import Variant
from workers.report import Report
from workers.report_words import TIER_NAMES, dearer, dollars, duration, factor, per_thousand, points, share, tokens

_UNNAMED = "(none)"
_WIDEST = 160


def render(report: Report, by: Sequence[str]) -> RenderableType:
    """Return the report as tables: the whole, by tier, by the dimensions asked for, top keys, notes."""
    return Group(*_parts(report, by))


def console(report: Report, by: Sequence[str]) -> Console:
    """Return a console wide enough for every figure: a cropped one would read as another."""
    usual, wide = Console(), Console(width=_WIDEST)
    parts = (part for part in _parts(report, by) if isinstance(part, Table))
    needed = max((Measurement.get(wide, wide.options, part).maximum for part in parts), default=0)
    return Console(width=needed) if needed > usual.width else usual


def _parts(report: Report, by: Sequence[str]) -> Iterator[RenderableType]:
    yield _headline(report)
    if not report.empty:
        yield _tiers(report)
        yield _money(report.total)
        for one in by:
            yield _variants(report.variants) if one == "experiment" else _group(one, report.groups[one])
        if report.top:
            yield _top(report)
    for note in notes(report):
        yield Text(note, style="dim")


def _table(title: str, *columns: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left", no_wrap=bool(at), min_width=None if at else 12)
    return table


def _headline(report: Report) -> Text:
    window, total = report.window, report.total
    line = Text(f"{window.since:%Y-%m-%d %H:%M} to {window.until:%Y-%m-%d %H:%M} UTC\n", style="dim")
    if report.empty:
        return line.append("No request was answered in this time.", style="not dim bold")
    line.append(f"{dollars(total.saved)} saved", style="not dim bold green")
    line.append(f", {dollars(total.spent)} spent: ", style="not dim bold")
    line.append(
        f"{total.requests:,} requests, {share(total.without_call_rate)} without a computation of their own",
        style="not dim",
    )
    return line


def _tiers(report: Report) -> Table:
    table = _table("", "answered by", "requests", "share", "p50", "p95", "saved")
    for tier in report.tiers:
        saved = "" if tier.tier == "llm" else dollars(tier.saved)
        name = TIER_NAMES.get(tier.tier, tier.tier)
        times = duration(tier.p50_ms), duration(tier.p95_ms)
        table.add_row(name, f"{tier.requests:,}", share(tier.share), *times, saved)
    total = report.total
    table.add_section()
    times = duration(total.p50_ms), duration(total.p95_ms)
    table.add_row("all", f"{total.requests:,}", "", *times, Text(dollars(total.saved), style="bold green"))
    return table


def _money(total: Line) -> Table:
    table = _table("", "", "calls", "prompt tokens", "completion tokens", "dollars")
    spent = f"{total.calls:,}", tokens(total.spent_prompt_tokens), tokens(total.spent_completion_tokens)
    table.add_row("spent", *spent, dollars(total.spent))
    saved = tokens(total.saved_prompt_tokens), tokens(total.saved_completion_tokens)
    table.add_row("saved", f"{total.hits + total.coalesced:,}", *saved, dollars(total.saved))
    table.add_row("  of it by coalescing", f"{total.coalesced:,}", "", "", dollars(total.saved_coalesced))
    table.add_section()
    table.add_row("without the cache", "", "", "", dollars(total.without_cache))
    table.add_row(Text("saved share", style="bold green"), "", "", "", share(total.saved_share))
    table.add_row("requests per computation", factor(total.coalescing_factor), "", "", "")
    table.add_row("requests per provider call", factor(total.requests_per_call), "", "", "")
    return table


def _group(by: str, lines: Sequence[Line]) -> Table:
    table = _table(f"By {by}", by, "requests", "hit rate", "calls", "spent", "saved", "p50", "p95")
    for line in lines:
        name = TIER_NAMES.get(line.name, line.name) if by == "tier" else line.name or _UNNAMED
        counts = f"{line.requests:,}", share(line.hit_rate), f"{line.calls:,}"
        money = dollars(line.spent), dollars(line.saved)
        table.add_row(name, *counts, *money, duration(line.p50_ms), duration(line.p95_ms))
    if not lines:
        table.add_row("nothing")
    return table


def _variants(variants: Sequence[Variant]) -> RenderableType:
    if not variants:
        return Text("By experiment: no request named one; see docs/savings.md\n")
    table = _table("By experiment", "variant", "requests", "hit rate", "$ per 1,000 requests", "p50, p95")
    for found in variants:
        name = f"{found.experiment} / {found.variant or _UNNAMED}"
        rate, cost = share(found.hit_rate), per_thousand(found.cost_per_request)
        if not found.baseline:
            rate += "\n" + points(found.hit_rate_difference).replace(" (", "\n(")
            cost += "\n" + dearer(found.cost_difference).replace(" (", "\n(")
        table.add_row(name, f"{found.requests:,}", rate, cost, f"{duration(found.p50_ms)}\n{duration(found.p95_ms)}")
    return table


def _top(report: Report) -> Table:
    table = _table("Top keys", "asked", "hits", "model", "saved")
    for key in report.top:
        what = Text(key.prompt or key.key, overflow="ellipsis", no_wrap=True)
        what.truncate(60, overflow="ellipsis")
        table.add_row(what, f"{key.hits:,}", key.model or "–", "–" if key.saved is None else dollars(key.saved))
    return table


def notes(report: Report) -> list[str]:
    """Return what a reader must know about these figures."""
    found = []
    total, window = report.total, report.window
    if report.first_hour is not None and report.first_hour > window.since:
        found.append(f"History begins at {report.first_hour:%Y-%m-%d %H:%M} UTC.")
    if report.first_hour is None:
        found.append("There is no history yet: hits are written by the persistence worker, about once a second.")
    if total.simulated_calls:
        found.append(
            f"The simulated provider answered {total.simulated_calls:,} of {total.calls:,} calls: no model was called; "
            "dollars are what the model it stands in for would have cost."
        )
    elif stored := sum(key.simulated for key in report.top):
        found.append(f"The simulated provider answered {stored:,} of the top keys: what its answers saved is no money.")
    if report.variants:
        found.append(
            "Intervals hold 95 % if hours are independent of each other; below eleven hours, if requests are, which "
            "makes them too narrow over a cold cache."
        )
    if total.unpriced_calls:
        found.append(
            f"{total.unpriced_calls:,} calls to models without a known price count as $0: set MILLPOND_PRICES."
        )
    if total.failed_calls:
        found.append(f"{total.failed_calls:,} of the calls failed.")
    if total.background_calls:
        found.append(
            f"{total.background_calls:,} calls ({dollars(total.overhead)}) refreshed or warmed: nobody waited for them."
        )
    return found
