"""How the operator's commands look on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workers.dead_letters import Letter
from workers.doctor import Finding
from workers.durable import Durable
from workers.overview import Overview

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
#: What each counter counts, in the order of the table.
COUNTERS = {
    "requests": "read by the lookup workers",
    "hit.l1": "answered from a lookup worker's memory",
    "hit.l2": "answered from Redis",
    "hit.l3": "answered from PostgreSQL",
    "collapsed": "joined a call already under way",
    "miss": "began a call of their own",
    "led": "left to an application to compute, for all who ask",
    "stale_if_error": "answered with what is kept for errors, for the provider failed lately",
    "failed_lately": "answered with the provider's last error, without another call",
    "degraded": "answered with what is kept for errors while a slow call went on",
    "refreshes": "refreshes begun for answers past, or near, the end of their freshness",
    "absent": "looked for in L2 and not there",
    "invalidated": "L2 entries found void, and removed",
    "swept": "answers deleted from Redis and PostgreSQL because they had been invalidated",
    "pruned": "markers of old invalidations removed, for nothing is left that they void",
    "unreadable": "L2 entries that could not be read, and removed",
    "promoted": "L2 entries that live longer because they were hit",
    "rehydrated": "answers written back from PostgreSQL into L2 because they were hit",
    "persisted": "answers handed to PostgreSQL, repetitions included",
    "touches_counted": "reports of hits counted in PostgreSQL",
    "touches_lost": "reports of hits that could not be read",
    "provider_calls": "calls to the provider, repeated attempts included",
    "provider_errors": "calls that failed, those tried again included",
    "stored": "computed answers that were stored",
    "not_stored": "computed answers delivered and not stored: no-store, bypass, invalidated meanwhile, cut short, …",
    "failed": "computations that ended in an error",
    "tokens.prompt": "prompt tokens of computed answers",
    "tokens.completion": "completion tokens of computed answers",
    "not_cached": "only-if-cached requests that found nothing",
    "expired": "requests whose deadline had passed when a worker read them",
    "invalid": "requests refused as malformed",
    "overloaded": "requests refused because the queue of the LLM workers was full",
    "handed_over": "requests moved to the partition they belong to",
    "abandoned": "computations dropped because nobody waited any longer",
    "l3_failures": "looks into PostgreSQL that failed or took too long",
    "leases_lost": "computations taken over by another worker; nothing written by the first",
    "memory_alerts": "times Redis' memory rose above its mark",
    "dead": "messages put among the dead letters",
}


class EventPrinter:
    """Prints the supervisor's events, one line each."""

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False)

    def __call__(self, event: dict[str, Any]) -> None:
        """Print one event."""
        self._console.print(_line(event))


def _line(event: dict[str, Any]) -> str:
    detail = escape(str(event.get("detail", "")))
    match event["event"]:
        case "ready":
            line = f"[green]ready[/]    {event['seconds']:.2f} s  {detail}"
        case "skipped":
            line = f"[yellow]without[/]  {detail}"
        case "migrated":
            line = f"[green]migrated[/] {detail}"
        case "configured":
            line = f"[green]using[/]    {escape(event['url'])}"
        case "running":
            return (
                f"[bold]All ready after {event['seconds']:.2f} s.[/] Ask from another terminal: "
                'millpond ask "What is a millpond?"   (Ctrl-C stops)'
            )
        case "exited":
            line = f"[red]ended[/]    {detail}; starts again in {event['restart_in']:g} s"
        case "error":
            line = f"[red]error[/]    {detail}"
        case "killed":
            line = "[red]killed[/]   it did not finish in time; what it held is taken over after its lease"
        case "stopping":
            return "[bold]Stopping[/] (once more: at once)"
        case other:
            line = str(other) if not event.get("status") else f"{other}, status {event['status']}"
    return f"{escape(event['component']):<14} {line}"


def show_overview(console: Console, seen: Overview) -> None:
    """Print counters, queues and workers."""
    if not seen.partitions:
        console.print("No worker has started here yet: millpond up")
        return
    counters = Table(title="Counters since birth", box=None, title_justify="left")
    counters.add_column(no_wrap=True)
    counters.add_column(justify="right", no_wrap=True)
    counters.add_column(justify="right", no_wrap=True)
    counters.add_column(style="dim")
    rates = seen.rates
    shown = [name for name in COUNTERS if name in seen.counters]
    for name in [*shown, *(name for name in seen.counters if name not in COUNTERS)]:
        share = f"{rates[name]:.1%}" if name in rates else ""
        counters.add_row(name, f"{seen.counters[name]:,}", share, COUNTERS.get(name, ""))
    console.print(counters)
    console.print(_queues(seen))
    console.print(_workers(seen))


def _queues(seen: Overview) -> Table:
    table = Table(title="\nQueues", box=None, title_justify="left")
    for heading in ("partition", "stream", "for", "entries", "in hand", "of dead workers", "not yet read", "consumers"):
        words = heading in ("stream", "for")
        table.add_column(heading, justify="left" if words else "right", no_wrap=words)
    for queue in seen.queues:
        waiting = "?" if queue.waiting is None else str(queue.waiting)
        numbers = (queue.length, queue.pending, queue.orphaned, waiting, queue.consumers)
        table.add_row(str(queue.partition), queue.stream, queue.group, *map(str, numbers))
    grouped = {(queue.partition, queue.stream) for queue in seen.queues}
    for partition, lengths in enumerate(seen.lengths):
        for stream in ("landed", "invalidations", "dead"):
            if (partition, stream) not in grouped:
                table.add_row(str(partition), stream, "", str(lengths[stream]))
    return table


def _workers(seen: Overview) -> Table:
    table = Table(title="\nLive workers", box=None, title_justify="left")
    for heading in ("kind", "name", "host", "pid"):
        table.add_column(heading)
    for worker in seen.workers:
        table.add_row(*(str(worker.get(name, "")) for name in ("kind", "name", "host", "pid")))
    if not seen.workers:
        table.add_row("none: millpond up")
    return table


def show_durable(console: Console, seen: Overview, stored: Durable | None) -> None:
    """Print what PostgreSQL holds and what waits for it."""
    waiting = sum(lengths["landed"] for lengths in seen.lengths)
    behind = f"; waiting for it: {waiting:,}, the oldest for {max(seen.backlog):.0f} s" if waiting else ""
    if stored is None:
        said = "none configured, none running"
    elif stored.error is not None:
        said = f"{stored.url}: {stored.error}"
    elif stored.answers is None or stored.bytes is None:
        said = f"{stored.url}: no schema yet: millpond migrate"
    else:
        about = "about " if stored.estimated else ""
        said = f"{about}{stored.answers:,} answers in {stored.bytes / 1e6:,.1f} MB"
    console.print(f"\nPostgreSQL  {escape(said)}{behind}", highlight=False, soft_wrap=True)


def show_finding(console: Console, finding: Finding) -> None:
    """Print one line of the doctor's report, and what to do below it."""
    colour = _COLOURS[finding.level]
    console.print(f"[{colour}]{finding.level:<5}[/] {finding.subject:<15} {escape(finding.detail)}", highlight=False)
    if finding.advice and finding.level != "ok":
        console.print(f"{'':22}→ {escape(finding.advice)}", style="dim", highlight=False)


def show_letters(console: Console, found: Sequence[Letter]) -> None:
    """Print a table of dead letters."""
    if not found:
        console.print("No dead letters.")
        return
    table = Table(box=None)
    for heading in ("partition", "id", "stream", "deliveries", "retryable", "reason"):
        table.add_column(heading, no_wrap=heading == "id")
    for letter in found:
        stream = letter.stream.rpartition(":")[2]
        retryable = "yes" if letter.retryable else "no"
        reason = escape(letter.reason)
        table.add_row(str(letter.partition), letter.id, stream, str(letter.deliveries), retryable, reason)
    console.print(table)
