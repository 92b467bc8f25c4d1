"""The command `millpond report`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import asyncpg
import typer

from shared.console import print_json, reporting
from shared.database import DATABASE_ERRORS, cannot_reach, connect_pool
from shared.errors import InvalidRequest, Unavailable
from shared.rounding import rounded
from shared.settings import Settings, load
from workers import report_charts, report_html, report_table
from workers.report import Report, Window, collect
from workers.report_sql import BYS, By

#: What the page shows beside a chart by the hour or day, whatever else is asked for.
_ON_THE_PAGE: tuple[By, ...] = ("profile", "tenant", "model", "experiment")


def report(
    since: Annotated[
        str, typer.Option(help="A span before now (90m, 24h, 7d, 2w) or an ISO date or time, UTC.")
    ] = "7d",
    until: Annotated[str | None, typer.Option(help="Likewise; now, unless given.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(BYS), help="A table by this too; may be given several times."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="Lines of each table, and top keys.")] = 10,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a self-contained page with charts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what was spent and saved, hit rates, latencies and top keys, from the history in PostgreSQL.

    Example: millpond report --since 7d --by model --html out/report.html

    Figures are of whole hours, and a few seconds behind. docs/savings.md says how each one is defined.

    Exit codes: 0 shown (also when nothing happened), 2 a wrong option or setting, or a page that cannot be written,
    3 no database, or it cannot be reached.
    """
    with reporting(as_json):
        wanted = _dimensions(by or ())
        window = Window.of(since, until, datetime.now(UTC))
        if html is not None and html.is_dir():
            raise InvalidRequest(f"--html {html} is a directory; name a file in it, such as report.html", field="html")
        settings = load()
        page = (report_charts.bucket(window), *_ON_THE_PAGE) if html is not None else ()
        shown = dict.fromkeys((*wanted, *page))
        found = asyncio.run(_read(settings, window, list(shown), top))
        if html is not None:
            _write(html, report_html.render(found))
        if as_json:
            print_json(rounded(found.as_dict()) | {"html": None if html is None else str(html)})
            return
        console = report_table.console(found, wanted)
        console.print(report_table.render(found, wanted), highlight=False)
        if html is not None:
            console.print(f"Page: {html}", style="dim", highlight=False)


def _dimensions(names: Sequence[str]) -> list[By]:
    found: list[By] = []
    for name in names:
        known = next((by for by in BYS if by == name), None)
        if known is None:
            raise InvalidRequest(f"--by is {name[:40]!r}; it can be: {', '.join(BYS)}", field="by")
        found.append(known)
    return found


async def _read(settings: Settings, window: Window, by: Sequence[By], top: int) -> Report:
    pool = await connect_pool(settings, name="millpond-report", size=1, min_size=1, command_timeout=None)
    try:
        async with pool.acquire() as connection:
            return await collect(connection, window, by, top, settings.experiments)
    except asyncpg.UndefinedTableError:
        raise Unavailable("the database has no history yet: run `millpond migrate`, or `millpond up`") from None
    except DATABASE_ERRORS as error:
        raise Unavailable(cannot_reach(error)) from None
    finally:
        await pool.close()


def _write(path: Path, page: str) -> None:
    try:
        if path.parent == Path("out"):
            path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as problem:
        raise InvalidRequest(
            f"--html {path}: {problem.strerror or problem}; name a file that can be written", field="html"
        ) from None
