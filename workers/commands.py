"""Commands for whoever runs Millpond: `up`, `worker`, `stats`, `dead`, `doctor`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from shared import embedded, settings
from shared.console import print_json, reporting
from shared.errors import InvalidRequest, Unavailable
from shared.link import LINK_ERRORS, Link
from shared.loop import run_fast
from workers import dead_letters, doctor, durable, overview, supervisor, tables
from workers.kinds import Kind

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line, instead of text.")]
Concurrency = Annotated[int | None, typer.Option(min=1, max=4096, help="Provider calls at once per LLM worker.")]
Partition = Annotated[int | None, typer.Option(min=0, help="Only this partition.")]

#: Seconds between the attempts to reach Redis at a worker's start; about ten in all.
_REACH_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.5, 2.0, 2.5, 2.5)


def up(
    lookup: Annotated[int, typer.Option(min=0, max=64, help="Lookup workers.")] = 1,
    llm: Annotated[int, typer.Option(min=0, max=64, help="LLM workers.")] = 1,
    concurrency: Concurrency = None,
    ephemeral: Annotated[bool, typer.Option(help="Keep no data: gone when it stops.")] = False,
    background: Annotated[bool, typer.Option(help="One worker of each further kind.")] = True,
    as_json: JsonLines = False,
) -> None:
    """Run everything until Ctrl-C: the workers, and the servers that no MILLPOND_REDIS_URL or _DATABASE_URL names.

    Example: millpond up --lookup 2 --concurrency 128

    Exit codes: 0 stopped when asked, 2 a wrong setting or a second `up` on the same data, 3 no server: the embedded
    one did not start, or the configured one did not answer within about ten seconds.
    """
    with reporting(as_json):
        chosen = settings.load()
        plan = supervisor.Plan(lookup, llm, concurrency, ephemeral, background, grace=chosen.drain_timeout + 6)
        emit = print_json if as_json else tables.EventPrinter()
        raise typer.Exit(supervisor.run(chosen, plan, emit))


def worker(
    kind: Annotated[Kind, typer.Argument(help="What it does.")],
    concurrency: Concurrency = None,
    as_json: JsonLines = False,
) -> None:
    """Run one worker in the foreground until SIGTERM or Ctrl-C; it finishes or hands back what it holds.

    Example: millpond worker llm --concurrency 128

    Exit codes: 0 stopped when asked, 2 a wrong setting, 3 Redis (for some kinds PostgreSQL too) cannot be reached at
    start, 1 anything else.
    """
    with reporting(as_json):
        chosen = settings.load(**({} if concurrency is None else {"concurrency": concurrency}))
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        logging.getLogger("stamina").setLevel(logging.ERROR)  # of each attempt it says no more than that there was one
        run_fast(_work(kind, chosen, as_json))


async def _work(kind: Kind, chosen: settings.Settings, as_json: bool) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    names = []

    def on_ready(name: str) -> None:
        names.append(name)
        if as_json:
            print_json({"event": "ready", "component": kind.value, "name": name, "pid": os.getpid()})
        else:
            provider = f", provider {supervisor.provider_in_force(chosen)}" if kind is Kind.llm else ""
            Console(soft_wrap=True).print(f"[green]ready[/]  {kind.value} worker {name}{escape(provider)}")

    if await _reach(embedded.resolve_url(chosen), stop):
        await kind.run(chosen, stop, on_ready)
    _say_stopped(kind, names, as_json)


def _say_stopped(kind: Kind, names: list[str], as_json: bool) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever listened may have ended first
        if as_json:
            named = {"name": names[0]} if names else {}  # none before it was ready
            print_json({"event": "stopped", "component": kind.value, **named, "pid": os.getpid()})
        else:
            Console(soft_wrap=True).print(" ".join([f"[green]stopped[/]  {kind.value} worker", *names]))


async def _reach(url: str, stop: asyncio.Event) -> bool:
    """Wait until Redis answers; False when told to stop first. Raises Unavailable when it does not come."""
    for pause in (*_REACH_PAUSES, None):
        link = Link(url, name="millpond-start")
        try:
            await link.call(("PING",))
            return True
        except LINK_ERRORS as error:
            if pause is None:
                raise Unavailable(f"cannot reach Redis: {error}; `millpond doctor` says what to do") from None
        finally:
            await link.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await stop.wait()
                return False
    return False


def stats(
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until Ctrl-C.")] = False,
    as_json: JsonLines = False,
) -> None:
    """Show counters since birth (the table says what each one counts), hit rates, queues, live workers, what is stored.

    Example: millpond stats --watch

    Exit codes: 0 shown, 2 a wrong setting, 3 Redis unavailable, 130 interrupted.
    """
    with reporting(as_json):
        chosen = settings.load()
        connection = overview.connect(embedded.resolve_url(chosen))
        console = Console()
        while True:
            seen = overview.look(connection)
            stored = durable.look(chosen)
            if as_json:
                print_json(seen.as_json() | {"database": stored and stored.as_json()})
            else:
                if watch:
                    console.clear()
                tables.show_overview(console, seen)
                tables.show_durable(console, seen, stored)
            if not watch:
                return
            time.sleep(2)


def diagnose(as_json: Json = False) -> None:
    """Check what is configured, reachable and healthy, and say what to do about the rest.

    Example: millpond doctor

    Exit codes: 0 nothing fails (warnings may show), 1 something fails, 2 a wrong setting.
    """
    with reporting(as_json):
        findings = []
        console = Console(soft_wrap=True)
        for finding in doctor.examine(settings.load()):
            findings.append(finding)
            if not as_json:
                tables.show_finding(console, finding)
        failed = any(finding.level == "fail" for finding in findings)
        if as_json:
            print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
        raise typer.Exit(1 if failed else 0)


dead = typer.Typer(
    no_args_is_help=True,
    help="Look at dead letters, try them again or discard them.\n\nExample: millpond dead list\n\n"
    "Exit codes: 0 done, 2 no such letter or a wrong setting, 3 Redis unavailable.",
)


@dead.command("list")
def dead_list(
    partition: Partition = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List the dead letters, oldest first, and which of them can be retried.

    Example: millpond dead list --limit 20
    """
    with reporting(as_json):
        connection, where, _ = _open(partition)
        found: list[dead_letters.Letter] = []
        for letter in dead_letters.letters(connection, where):
            found.append(letter)
            if len(found) == limit:
                break
        if as_json:
            print_json({"letters": [letter.as_json(whole=False) for letter in found]})
        else:
            tables.show_letters(Console(), found)


@dead.command("show")
def dead_show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="As `millpond dead list` shows it.")],
    partition: Partition = None,
    as_json: Json = False,
) -> None:
    """Show one dead letter whole: why it died and the message it was.

    Example: millpond dead show 1760000000000-0
    """
    with reporting(as_json):
        connection, where, _ = _open(partition)
        letter = dead_letters.find(connection, where, letter_id).as_json(whole=True)
        if as_json:
            print_json(letter)
        else:
            Console().print_json(data=letter)


@dead.command("retry")
def dead_retry(
    letter_id: Annotated[str | None, typer.Argument(metavar="ID", help="As `millpond dead list` shows it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every letter that can be retried.")] = False,
    partition: Partition = None,
    as_json: Json = False,
) -> None:
    """Publish a dead letter's message once more and remove the letter. A fill becomes a request nobody waits for.

    --all leaves alone what holds no request to publish: such a letter can only be shown or discarded.

    Example: millpond dead retry --all
    """
    with reporting(as_json):
        _one_or_all(letter_id, everything)
        connection, where, chosen = _open(partition)
        left: list[dead_letters.Letter] = []
        if letter_id is not None:
            wanted = [dead_letters.find(connection, where, letter_id)]
        else:  # all that lie there now: a letter that dies again is not retried again
            wanted = []
            for letter in dead_letters.letters(connection, where):
                (wanted if letter.retryable else left).append(letter)
        retried = [letter.id for letter in wanted if dead_letters.retry(connection, letter, chosen)]
        if as_json:
            print_json({"retried": retried, "left": [letter.id for letter in left]})
            return
        console = Console(soft_wrap=True, highlight=False)
        console.print(f"{len(retried)} retried")
        if left:
            console.print(f"{len(left)} left alone, no request in them: `millpond dead show` one, or discard it")


@dead.command("discard")
def dead_discard(
    letter_id: Annotated[str | None, typer.Argument(metavar="ID", help="As `millpond dead list` shows it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every letter there is now.")] = False,
    partition: Partition = None,
    as_json: Json = False,
) -> None:
    """Remove a dead letter for good, without asking back.

    Example: millpond dead discard 1760000000000-0
    """
    with reporting(as_json):
        _one_or_all(letter_id, everything)
        connection, where, _ = _open(partition)
        if letter_id is None:
            discarded = dead_letters.discard_all(connection, where)
        else:
            letter = dead_letters.find(connection, where, letter_id)
            discarded = [letter.id] if dead_letters.discard(connection, letter) else []
        if as_json:
            print_json({"discarded": discarded})
        else:
            Console().print(f"{len(discarded)} discarded")


def _one_or_all(letter_id: str | None, everything: bool) -> None:
    if everything == (letter_id is not None):
        raise InvalidRequest("give one ID, or --all", field="id")


def _open(partition: int | None) -> tuple[Any, range, settings.Settings]:
    chosen = settings.load()
    connection = overview.connect(embedded.resolve_url(chosen))
    partitions = overview.partitions_in_use(connection, chosen)
    if partition is None:
        return connection, range(partitions), chosen
    if partition >= partitions:
        there = f"are 0 to {partitions - 1}" if partitions > 1 else "is only 0"
        raise InvalidRequest(f"--partition is {partition}; there {there}", field="partition")
    return connection, range(partition, partition + 1), chosen
