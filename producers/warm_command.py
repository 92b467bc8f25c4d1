"""The command `millpond warm`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from producers.replay import workload
from producers.replay.words import counted
from shared.console import INTERRUPTED, OTHER, print_json, reporting
from shared.deployment import recorded
from shared.embedded import resolve_url
from shared.errors import InvalidRequest, Unavailable
from shared.link import Link
from shared.messages import Rules
from shared.rounding import rounded
from shared.settings import Settings, load
from shared.times import moment
from shared.warming import Account, Warmer, Wish, most_asked, wish_for


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to warm; the options of `millpond warm`."""

    file: Path | None
    top: int | None
    since: datetime
    rate: float | None
    at_once: int | None
    limit: int | None
    skip_bad: bool
    model: str | None
    profile: str | None
    tenant: str | None


@dataclass(frozen=True, slots=True)
class _Done:
    """What it came to; `left_out` of the top answers could not be asked again, `skipped` lines not be read."""

    account: Account
    left_out: int
    skipped: int
    interrupted: bool


def warm(
    file: Annotated[Path | None, typer.Argument(help="Requests, in any format of `millpond replay`.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Instead of a file: the answers hit most often.")] = None,
    since: Annotated[str, typer.Option(help="With --top: hit since then (24h, 7d, or an ISO date, UTC).")] = "7d",
    rate: Annotated[float | None, typer.Option(min=0.001, help="Computations begun per second, at most.")] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Computations under way, at most; half an LLM worker's, unless given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N requests of the file.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count unreadable lines and go on.")] = False,
    model: Annotated[str | None, typer.Option(help="Put every request of the file to this model.")] = None,
    profile: Annotated[str | None, typer.Option(help="Cache profile of requests that name none.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant of requests that name none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; the bar stays on stderr.")] = False,
) -> None:
    """Have answers computed before anybody asks; what is stored already is left alone, live requests come first.

    Example: millpond warm faq.jsonl --rate 5

    Example: millpond warm --top 500 --since 7d

    --top needs prompts to have been stored (MILLPOND_STORE_PROMPTS=true on the workers) and PostgreSQL.

    Exit codes: 0 every answer is there or on its way, 1 some are not, 2 wrong option, file or setting, 3 Redis, the LLM
    workers or PostgreSQL unavailable, 130 interrupted (what was begun is still computed).
    """
    with reporting(as_json):
        if (file is None) == (top is None):
            raise InvalidRequest("give a FILE, or --top N", field="file")
        begin = moment(since, "since", datetime.now(UTC))
        plan = _Plan(file, top, begin, rate, at_once, limit, skip_bad, model, profile, tenant)
        done = asyncio.run(_run(load(), plan))
        if as_json:
            told = {"left_out": done.left_out, "skipped": done.skipped, "interrupted": done.interrupted}
            print_json(rounded(asdict(done.account)) | told)
        else:
            _show(done)
        if done.interrupted:
            raise typer.Exit(INTERRUPTED)
        if not done.account.complete:
            raise typer.Exit(OTHER)


async def _run(settings: Settings, plan: _Plan) -> _Done:
    rules = Rules.of(settings)
    wishes, skipped = ([], 0) if plan.file is None else _from_file(plan.file, plan, rules)
    left_out = 0
    async with contextlib.AsyncExitStack() as stack:
        link = Link(resolve_url(settings), name="millpond-warm")
        stack.push_async_callback(link.close)
        partitions = await recorded(link, settings.partitions)
        if partitions is None:
            raise Unavailable("no deployment runs here yet: millpond up")
        pool = await _database(settings, stack, needed=plan.top is not None)
        if plan.top is not None:
            wishes, left_out = await _from_history(pool, plan, rules)
        warmer = Warmer(link, settings, partitions, pool, rate=plan.rate, at_once=plan.at_once)
        with _bar(len(wishes)) as told:
            interrupted = await _interruptible(warmer, wishes, told)
    return _Done(warmer.account, left_out, skipped, interrupted)


async def _interruptible(warmer: Warmer, wishes: list[Wish], told: Callable[[Account], None]) -> bool:
    """Warm until done or Ctrl-C; return whether it was the latter."""
    work = asyncio.create_task(warmer.run(wishes, told))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        return True
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return False


def _from_file(file: Path, plan: _Plan, rules: Rules) -> tuple[list[Wish], int]:
    try:
        read = workload.read(file, limit=plan.limit, skip_bad=plan.skip_bad)
    except OSError as problem:
        raise InvalidRequest(f"{file}: {problem.strerror}; give a file that can be read", field="file") from None
    requests = read.requests if plan.model is None else workload.with_model(read.requests, plan.model)
    found = []
    for request in requests:
        named = {"profile": request.profile or plan.profile, "tenant": request.tenant or plan.tenant}
        found.append(wish_for(request.body, {name: value for name, value in named.items() if value is not None}, rules))
    return found, read.skipped


async def _from_history(pool: Any, plan: _Plan, rules: Rules) -> tuple[list[Wish], int]:
    found, left_out = await most_asked(pool, plan.since, plan.top or 0, rules)
    if not found and left_out:
        raise InvalidRequest(
            f"none of the {left_out} answers hit most can be asked again: their prompts were not stored, or their keys "
            "have changed. Set MILLPOND_STORE_PROMPTS=true on the LLM workers and let history gather",
            field="top",
        )
    return found, left_out


async def _database(settings: Settings, stack: contextlib.AsyncExitStack, *, needed: bool) -> Any:
    """Return connections to PostgreSQL; None where there is none and none is needed."""
    from shared.database import connect_pool, resolve_database_url

    if not needed and resolve_database_url(settings) is None:
        return None
    pool = await connect_pool(settings, name="millpond-warm", size=2, min_size=1)
    stack.push_async_callback(pool.close)
    return pool


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[Account], None]]:
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.fields[cost]}"))
    with Progress(
        TextColumn("  warm"), *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("warm", total=total, cost="$0.0000")
        yield lambda account: bar.update(task, completed=account.settled, cost=f"${account.dollars:.4f}")


def _show(done: _Done) -> None:
    console, account = Console(highlight=False), done.account
    there = account.present + account.restored
    console.print(
        f"[bold]{counted(account.warmed, 'answer')} warmed[/] for ${account.dollars:,.4f} in {account.seconds:.1f} s, "
        f"{there:,} already there"
        + (f" ({account.restored:,} brought back from PostgreSQL)" if account.restored else "")
    )
    rest = {
        "asked for more than once in the file": account.repeated,
        "being computed already, for somebody else": account.under_way,
        "not tried: they have just failed": account.backing_off,
        "of models without a known price, counted as $0": account.unpriced,
        "left out: no stored prompt, or their key has changed": done.left_out,
        "unreadable, skipped": done.skipped,
        "begun or waiting when this was interrupted": account.unfinished if done.interrupted else 0,
    }
    for words, number in rest.items():
        if number:
            console.print(f"{number:,} {words}", style="dim")
    for code, number in sorted(account.errors.items()):
        console.print(f"{number:,} failed: {code}", style="red")
