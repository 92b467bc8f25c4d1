"""PostgreSQL servers for the tests, and a fresh, migrated database on one of them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

import migrations
from shared import postgres
from shared.errors import ConfigError

_TEMPLATE = "millpond_test_template"
_numbers = count(1)


def kinds() -> list[str]:
    """Return which servers there are: `url`, else the embedded `postgres18` and Debian's, else `container`."""
    if os.environ.get("MILLPOND_TEST_DATABASE_URL"):
        return ["url"]
    found = []
    try:
        packaged = postgres.find_binaries()
        found.append("embedded")
    except ConfigError:
        return ["container"] if docker_answers() else ["none"]
    return found + [f"debian{place.parent.name}" for place in _debian() if place != packaged]


def docker_answers() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0


def binaries(kind: str) -> Path | None:
    """Return where the binaries of a kind lie; None for the embedded ones."""
    return next((place for place in _debian() if kind == f"debian{place.parent.name}"), None)


def _debian() -> list[Path]:
    return sorted(place for place in Path("/usr/lib/postgresql").glob("*/bin") if (place / "initdb").exists())


@dataclass(frozen=True, slots=True)
class Database:
    """One database; `kind` is its server's."""

    kind: str
    url: str

    async def connect(self) -> asyncpg.Connection:
        """Return a plain connection; the caller closes it."""
        return await asyncpg.connect(self.url)

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        """Return the rows of one query."""
        connection = await self.connect()
        try:
            rows: list[Any] = await connection.fetch(query, *arguments)
            return rows
        finally:
            await connection.close()

    async def value(self, query: str, *arguments: Any) -> Any:
        """Return the first column of the first row of one query."""
        return (await self.fetch(query, *arguments))[0][0]


@dataclass(slots=True)
class Servers:
    """The servers of one test session, each started when the first test asks for it."""

    directory: Path
    running: dict[str, Database] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)

    def get(self, kind: str) -> Database:
        """Return the server's own database, from which others are made."""
        if kind not in self.running:
            self.running[kind] = server = Database(kind, self._start(kind))
            run_sql(server.url, f"DROP DATABASE IF EXISTS {_TEMPLATE}", f"CREATE DATABASE {_TEMPLATE}")
            migrations.migrate(named(server.url, _TEMPLATE))
        return self.running[kind]

    def copy_cluster(self, kind: str, target: Path) -> None:
        """Lay a cluster with the schema, made once, where `postgres.start(target)` finds its own."""
        made = self.directory / f"{kind}-cluster"
        if not made.exists():
            with postgres.start(made, binaries=binaries(kind), options={"fsync": "off"}) as running:
                migrations.migrate(running.url)
        (target / "postgres").mkdir(mode=0o700, parents=True)
        subprocess.run(["cp", "-a", made / "postgres" / "data", target / "postgres"], check=True)

    def _start(self, kind: str) -> str:
        if kind == "url":
            return os.environ["MILLPOND_TEST_DATABASE_URL"]
        if kind == "container":
            from testcontainers.postgres import PostgresContainer

            url: str = self.stack.enter_context(PostgresContainer("postgres:18", driver=None)).get_connection_url()
            return url
        place = self.directory / kind
        return self.stack.enter_context(postgres.start(place, ephemeral=True, binaries=binaries(kind))).url


@contextmanager
def fresh(server: Database, *, migrated: bool = True) -> Iterator[Database]:
    """Make a database, empty but for the schema (`migrated` false: empty), and drop it afterwards."""
    name = f"millpond_test_{os.getpid()}_{next(_numbers)}"
    run_sql(server.url, f"CREATE DATABASE {name}" + (f" TEMPLATE {_TEMPLATE}" if migrated else ""))
    try:
        yield Database(server.kind, named(server.url, name))
    finally:
        run_sql(server.url, f"DROP DATABASE {name} WITH (FORCE)")


def named(url: str, database: str) -> str:
    """Return the URL of another database on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


def run_sql(url: str, *commands: str) -> None:
    """Run each command by itself, from where no loop runs."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            for command in commands:
                await connection.execute(command)
        finally:
            await connection.close()

    asyncio.run(run())
