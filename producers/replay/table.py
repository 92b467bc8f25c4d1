"""The report as a person reads it."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from producers.replay.report import Money, Report, Way
from producers.replay.style import colour
from producers.replay.words import counted, per_second

CALLED = {"l1": "l1: the worker's memory", "l2": "l2: Redis", "l3": "l3: PostgreSQL", "llm": "llm: computed for it"}

LONGEST_MESSAGE = 400


def render(report: Report) -> RenderableType:
    """Return the report as tables for a terminal of 80 columns or more."""
    return Group(_headline(report), Text(), _ways(report), *_errors(report), Text(), _calls(report), *_notes(report))


def _headline(report: Report) -> Text:
    line = Text(counted(report.requests, "request"), style="bold")
    line.append(f" from {report.run.source}, {report.run.arrivals}", style="not bold")
    line.append(f"\n{report.wall_s:,.1f} s, {per_second(report.answered_per_s)} answers/s", style="not bold")
    line.append(f", latency from {report.run.latency_from}", style="not bold dim")
    return line


def _ways(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("answered by")
    for name in ("requests", "share", "p50", "p95", "p99"):
        table.add_column(name, justify="right")
    rows = {way: figures for way, figures in report.tiers.items() if way != "llm"}
    rows["coalesced"] = report.coalesced
    rows["llm"] = report.tiers["llm"]
    for way, figures in rows.items():
        name = "coalesced: joined a call" if way == "coalesced" else CALLED.get(way, way)
        table.add_row(Text(name, style=colour(way)), *_figures(figures))
    for code, count in report.errors.items():
        table.add_row(Text(f"error: {code}", style="bold red"), f"{count:,}", f"{count / report.requests:.1%}")
    table.add_section()
    table.add_row(
        Text("without a call of its own", style="bold"), f"{report.without_call:,}", f"{report.without_call_share:.1%}"
    )
    return table


def _errors(report: Report) -> list[Text]:
    """Return the first message of each error, on one line and without what a terminal would obey."""
    lines = []
    for code, message in report.error_messages.items():
        plain = "".join(letter if letter.isprintable() else " " for letter in message)
        shown = " ".join(plain.split())
        shown = shown if len(shown) <= LONGEST_MESSAGE else shown[:LONGEST_MESSAGE] + "…"
        lines.append(Text.assemble((f"First {code}: ", "bold red"), shown or "no message"))
    return lines


def _figures(way: Way) -> tuple[str, ...]:
    if not way.count:
        return ("0", "0.0%", "-", "-", "-")
    return (f"{way.count:,}", f"{way.share:.1%}", *map(_time, (way.p50_ms, way.p95_ms, way.p99_ms)))


def _time(ms: float) -> str:
    if ms < 10:
        return f"{ms:.2f} ms"
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def _calls(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("calls", "prompt tokens", "completion tokens", "dollars"):
        table.add_column(name, justify="right")
    table.add_row("spent", *_money(report.spent))
    table.add_row(Text("saved", style="bold green"), *_money(report.saved))
    table.add_section()
    without = report.dollars_without_cache
    table.add_row(
        "without the cache",
        f"{report.spent.calls + report.saved.calls:,}",
        f"{report.spent.prompt_tokens + report.saved.prompt_tokens:,}",
        f"{report.spent.completion_tokens + report.saved.completion_tokens:,}",
        f"${without:,.4f}",
    )
    table.add_row(Text("saved share", style="bold green"), "", "", "", f"{report.saved_share:.1%}")
    return table


def _money(money: Money) -> tuple[str, ...]:
    tokens = f"{money.prompt_tokens:,}", f"{money.completion_tokens:,}"
    return f"{money.calls:,}", *tokens, f"${money.dollars:,.4f}"


def _notes(report: Report) -> list[Text]:
    provider, notes = report.provider, []
    called = (
        "an unknown number of calls (counters unreadable)"
        if provider.calls is None
        else counted(provider.calls, "call")
    )
    if provider.errors:
        called += f", {provider.errors:,} failed"
    what = f"{provider.name} (no model was called; dollars are what the model it stands in for would have cost)"
    notes.append(f"Provider: {what if provider.simulated else provider.name}; its workers counted {called}.")
    if unpriced := report.spent.unpriced + report.saved.unpriced:
        notes.append(f"{counted(unpriced, 'answer')} from models without a known price: counted as $0.")
    if report.run.skipped_lines:
        notes.append(f"Skipped {counted(report.run.skipped_lines, 'unreadable line')} of the file.")
    if report.driver_lag_p99_ms > 100:
        notes.append(
            f"This process sent 1 % of the requests {report.driver_lag_p99_ms:,.0f} ms late or more: lower --speedup "
            "or --rate, or give --concurrency more room."
        )
    if report.run.interrupted:
        notes.append("Interrupted: the figures are of what was answered by then.")
    return [Text(note, style="dim") for note in notes]
