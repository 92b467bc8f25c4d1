"""What a deployment's PostgreSQL looks like from outside, for `millpond stats` and `doctor`; `millpond migrate`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

import asyncpg
import typer
from rich.console import Console

import migrations
from shared import console, postgres, settings
from shared.database import CONNECT_TIMEOUT, DATABASE_ERRORS, require_database_url, resolve_database_url
from shared.settings import Settings

#: Above so many answers their number is PostgreSQL's own estimate: counting them reads them all.
COUNT_UP_TO = 100_000
_LOOK_TIMEOUT = 10.0
_UNREADABLE: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, ValueError)

_SERVER = """
SELECT current_setting('server_version_num')::int / 10000 AS major, current_setting('server_version') AS version,
       (SELECT coalesce('installed ' || installed_version, 'available')
        FROM pg_available_extensions WHERE name = 'vector') AS vector
"""
_ANSWERS = """
SELECT CASE WHEN reltuples > $1 THEN reltuples::bigint ELSE (SELECT count(*) FROM answers) END AS answers,
       reltuples > $1 AS estimated, pg_total_relation_size(oid) AS bytes
FROM pg_class WHERE oid = 'answers'::regclass
"""


@dataclass(frozen=True, slots=True)
class Durable:
    """One look at PostgreSQL. `url` is without its password; `error` says why the rest is not known.

    `schema` is the step it stands at, None before the first; `answers` and `bytes` what is stored, None without a
    schema; `vector` tells of pgvector: None, `available` or `installed VERSION`.
    """

    url: str
    error: str | None = None
    major: int = 0
    version: str = ""
    vector: str | None = None
    schema: str | None = None
    answers: int | None = None
    estimated: bool = False
    bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what `millpond stats --json` shows."""
        if self.error is not None:
            return {"url": self.url, "error": self.error}
        names = ("url", "version", "schema", "answers", "estimated", "bytes")
        return {name: getattr(self, name) for name in names}


def look(settings: Settings) -> Durable | None:
    """Return how the durable tier stands now; None when there is none, configured or running."""
    url = resolve_database_url(settings)
    if url is not None:
        return asyncio.run(_look(url))
    silent = settings.l3 and postgres.was_started(settings.data_dir)
    return Durable(f"the embedded one on {settings.data_dir}", error="it does not answer") if silent else None


async def _look(url: str) -> Durable:
    shown = console.masked(url)
    try:
        async with asyncio.timeout(_LOOK_TIMEOUT):
            connection = await asyncpg.connect(
                url, timeout=CONNECT_TIMEOUT, server_settings={"application_name": "millpond-cli"}
            )
            try:
                server = await connection.fetchrow(_SERVER)
                schema = await migrations.version(connection)
                stored = await connection.fetchrow(_ANSWERS, float(COUNT_UP_TO)) if schema is not None else {}
            finally:
                await connection.close()
    except _UNREADABLE as error:
        words = "its URL cannot be read" if isinstance(error, ValueError) else str(error) or type(error).__name__
        return Durable(shown, error=words)
    return Durable(shown, **dict(server), schema=schema, **dict(stored))


def migrate(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Bring PostgreSQL's schema up to date; `millpond up` does it by itself. Safe while workers run.

    Example: millpond migrate

    Exit codes: 0 up to date, 2 a wrong setting or a database newer than this version, 3 PostgreSQL unavailable.
    """
    with console.reporting(as_json):
        url = require_database_url(settings.load())
        before = migrations.current(url)
        applied = migrations.migrate(url)
        after = migrations.KNOWN[-1]
        if as_json:
            console.print_json({"before": before, "after": after, "applied": applied})
            return
        said = f"{before or 'empty'} → {after}" if applied else f"{after}, up to date already"
        Console(soft_wrap=True, highlight=False).print(f"schema {said}")
