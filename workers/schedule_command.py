"""`millpond schedule`: what the scheduled jobs last came to, and running one by hand."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared import embedded, keys, settings
from shared.console import print_json, reporting
from shared.deployment import settle
from shared.errors import InvalidRequest
from shared.link import Link
from workers.desk import Desk, Result
from workers.jobs import JOBS, perform

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

schedule = typer.Typer(
    no_args_is_help=True,
    help="Look at the scheduled jobs, or run one by hand.\n\nExample: millpond schedule list\n\n"
    "Exit codes: 0 done, 1 the job failed, 2 no such job or a wrong setting, 3 Redis unavailable.",
)


@schedule.command("list")
def list_jobs(as_json: Json = False) -> None:
    """List the jobs: what each does and how often, what its last run came to, when the next is due.

    Example: millpond schedule list --json
    """
    with reporting(as_json):
        jobs = asyncio.run(_look())
        if as_json:
            print_json({"jobs": jobs})
            return
        table = Table(box=None)
        for heading in ("job", "every", "next", "last", "took", "outcome"):
            table.add_column(heading, no_wrap=heading in ("job", "next"), overflow="fold")
        for job in jobs:
            last = job["last"] or {}
            took = f"{last['seconds']:.2f} s" if last else ""
            when = f"{_ago(last['at'])} ago" if last else "never"
            due = datetime.fromisoformat(job["next"]).astimezone().strftime("%H:%M:%S")
            table.add_row(job["name"], job["every"], due, when, took, _outcome(last))
        Console().print(table)


@schedule.command("run")
def run_job(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `millpond schedule list` shows it.")],
    as_json: Json = False,
) -> None:
    """Run one job now, here, and show what it did. Jobs are idempotent: one more run does no harm.

    A job that needs PostgreSQL fails without one, unless MILLPOND_L3=false does without; then it is skipped.

    Example: millpond schedule run retention

    Exit codes: 0 done, 1 the job failed, 2 no such job or a wrong setting, 3 Redis unavailable.
    """
    with reporting(as_json):
        if name not in JOBS:
            raise InvalidRequest(f"there is no job {name!r}; there are {', '.join(JOBS)}", field="name")
        done = asyncio.run(_run(name))
        if as_json:
            print_json(done)
        else:
            skipped = done["ok"] and "skipped" in done["result"]
            word = "" if skipped else "[green]done[/]  " if done["ok"] else "[red]failed[/]  "
            line = f"{word}{name} in {done['seconds']:.2f} s: {_outcome(done)}"
            Console(soft_wrap=True, highlight=False).print(line)
        raise typer.Exit(0 if done["ok"] else 1)


async def _run(name: str) -> Result:
    chosen = settings.load()
    url = embedded.resolve_url(chosen)
    link = Link(url, name="millpond-cli")
    try:
        partitions = await settle(link, chosen.partitions)
    finally:
        await link.close()
    desk = Desk(url, chosen, partitions, by_hand=True)
    try:
        return await perform(desk, JOBS[name], "hand")
    finally:
        await desk.close()


async def _look() -> list[dict[str, Any]]:
    from workers.schedule import next_time

    link = Link(embedded.resolve_url(settings.load()), name="millpond-cli")
    try:
        records = await link.call(("MGET", *map(keys.schedule, JOBS)))
    finally:
        await link.close()
    return [
        {
            "name": job.name,
            "what": job.what,
            "every": job.every,
            "next": next_time(job).isoformat(),
            "last": orjson.loads(record) if record else None,
        }
        for job, record in zip(JOBS.values(), records, strict=True)
    ]


def _outcome(record: dict[str, Any]) -> str:
    if not record:
        return ""
    if not record["ok"]:
        return f"[red]{escape(str(record['error']))}[/]"
    result = record["result"]
    if "skipped" in result:
        return escape(f"skipped: {result['skipped']}")
    return escape(", ".join(f"{_words(name)} {_figure(result[name])}" for name in result) or "nothing to do")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(value: Any) -> str:
    """A list is told by its length, what is not known by a dash; `--json` has it whole."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return str(len(value) if isinstance(value, list) else value)


def _ago(at: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
