"""The servers that `millpond up` works on: the configured ones, else embedded ones that it starts and stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import migrations
from shared import console, embedded, postgres
from shared.errors import ConfigError, Unavailable
from shared.servers import EmbeddedServer
from shared.settings import Settings

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Stores:
    """Where the stores are, and which of them run here, by component name.

    `database_url` is None when the deployment does without PostgreSQL; `migrated` is false while it does not answer.
    """

    redis_url: str
    database_url: str | None
    embedded: dict[str, EmbeddedServer]
    migrated: bool

    @property
    def environment(self) -> dict[str, str]:
        """What tells a worker where they are."""
        found = {"MILLPOND_REDIS_URL": self.redis_url}
        if self.database_url is None:
            return found | {"MILLPOND_L3": "false"}
        return found | {"MILLPOND_DATABASE_URL": self.database_url}


@contextmanager
def opened(settings: Settings, emit: Emit, *, ephemeral: bool) -> Iterator[Stores]:
    """Start what is not configured, bring the schema up to date; stop at the end what was started.

    Call it from the thread that lives longest: a server dies with the one that forked it.

    Raises:
        ConfigError: no Redis can be started here, another process runs one on this data directory, or the database is
            newer than this code.
        Unavailable: an embedded server did not come up.
    """
    with ExitStack() as stack:
        running: dict[str, EmbeddedServer] = {}
        began = time.monotonic()
        if settings.redis_url is not None:
            redis_url = settings.redis_url.get_secret_value()
            emit({"event": "configured", "component": "redis", "url": console.masked(redis_url)})
        else:
            server = embedded.start(settings.data_dir, ephemeral=ephemeral)
            running["redis"] = server
            stack.callback(_stop, "redis", server, emit)
            redis_url = server.url
            emit(ready(server, began))
        database_url = _database(settings, emit, stack, running, ephemeral)
        migrated = database_url is None or _migrated(database_url, emit, running)
        yield Stores(redis_url, database_url, running, migrated)


def ready(server: EmbeddedServer, began: float) -> dict[str, Any]:
    """Return the event that tells of a server that runs; `began` is when its start did."""
    kept = "nothing is kept" if server.ephemeral else f"data in {server.data}"
    version = f" {server.version}" if isinstance(server, postgres.EmbeddedPostgres) else ""
    return {
        "event": "ready",
        "component": server.name,
        "pid": server.pid,
        "url": server.url,
        "detail": f"embedded {server.binary.name}{version}, {kept}",
        "seconds": round(time.monotonic() - began, 3),
    }


def _database(
    settings: Settings, emit: Emit, stack: ExitStack, running: dict[str, EmbeddedServer], ephemeral: bool
) -> str | None:
    if not settings.l3:
        emit({"event": "skipped", "component": "postgres", "detail": "switched off (MILLPOND_L3=false)"})
        return None
    if settings.database_url is not None:
        url = settings.database_url.get_secret_value()
        emit({"event": "configured", "component": "postgres", "url": console.masked(url)})
        return url
    try:
        binaries = postgres.find_binaries()
    except ConfigError as error:
        emit({"event": "skipped", "component": "postgres", "detail": error.message})
        return None
    began = time.monotonic()
    server = postgres.start(settings.data_dir, ephemeral=ephemeral, binaries=binaries)
    running["postgres"] = server
    stack.callback(_stop, "postgres", server, emit)
    emit(ready(server, began))
    return server.url


def _migrated(url: str, emit: Emit, running: dict[str, EmbeddedServer]) -> bool:
    try:
        applied = migrations.migrate(url)
    except Unavailable as error:
        if "postgres" in running:
            raise
        emit(
            {
                "event": "error",
                "component": "postgres",
                "detail": f"{error.message}; going on without it until it answers",
            }
        )
        return False
    if applied:
        emit(migrated(applied))
    return True


def migrated(applied: list[str]) -> dict[str, Any]:
    """Return the event that tells of schema steps applied."""
    return {
        "event": "migrated",
        "component": "postgres",
        "detail": f"schema brought to {applied[-1]}",
        "applied": applied,
    }


def _stop(component: str, server: EmbeddedServer, emit: Emit) -> None:
    server.stop()
    emit({"event": "stopped", "component": component})
