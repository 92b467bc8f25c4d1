"""Connections to PostgreSQL: where it is, and a pool that suits the workers.

Only workers and the operator's commands import this module; it needs asyncpg, which an application does not.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import asyncpg
import orjson

from shared import postgres
from shared.errors import Unavailable
from shared.settings import Settings

#: What any call on a pool or a connection raises when the server is away, slow, restarting, or refuses.
DATABASE_ERRORS: tuple[type[BaseException], ...] = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that broke at an awkward moment
    OSError,
    TimeoutError,
)

CONNECT_TIMEOUT = 5.0
#: A pool would warn with a traceback each time a connection fails: whoever asks it says so already, in one line.
logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)
_JSONB_VERSION = b"\x01"


def resolve_database_url(settings: Settings) -> str | None:
    """Return the PostgreSQL URL in force: the configured one, else the running embedded server's, else None.

    None too when the settings do without a durable tier (`l3` is false).
    """
    if not settings.l3:
        return None
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return postgres.find(settings.data_dir)


def require_database_url(settings: Settings) -> str:
    """Return what `resolve_database_url` does.

    Raises:
        Unavailable: that is none.
    """
    if (url := resolve_database_url(settings)) is not None:
        return url
    if not settings.l3:
        raise Unavailable("MILLPOND_L3=false does without PostgreSQL, which this needs")
    raise Unavailable(postgres.missing(settings.data_dir))


async def connect_pool(
    where: Settings | str,
    *,
    name: str = "millpond",
    size: int = 4,
    min_size: int = 0,
    command_timeout: float | None = 60.0,
    **options: str,
) -> asyncpg.Pool:
    """Return a pool of at most `size` connections, made as they are needed: it does not wait for the server.

    Unless `min_size` asks for connections at once. `name` is shown as the application's name in `pg_stat_activity`;
    `command_timeout` (seconds) bounds each command; `options` are server settings of the sessions
    (`statement_timeout="250"`). `jsonb` is read and written as Python values, also by COPY.

    Raises:
        Unavailable: the settings name no server and none is running; with `min_size`, it does not answer.
    """
    url = where if isinstance(where, str) else require_database_url(where)
    try:
        return await asyncpg.create_pool(
            url,
            min_size=min_size,
            max_size=size,
            timeout=CONNECT_TIMEOUT,
            command_timeout=command_timeout,
            server_settings={"application_name": name, "jit": "off", "timezone": "UTC"} | options,
            init=_prepare,
        )
    except DATABASE_ERRORS as error:
        raise Unavailable(cannot_reach(error)) from None


class LatePool:
    """A pool that several share, made once there is a server to connect to."""

    def __init__(self, settings: Settings, *, name: str, command_timeout: float | None = 60.0) -> None:
        self._settings = settings
        self._name = name
        self._command_timeout = command_timeout
        self._pool: asyncpg.Pool | None = None
        self._opening = asyncio.Lock()

    async def get(self) -> asyncpg.Pool | None:
        """Return it; None while no server is known, or the deployment does without."""
        async with self._opening:
            if self._pool is None and (url := resolve_database_url(self._settings)) is not None:
                timeout = self._command_timeout
                self._pool = await connect_pool(url, name=self._name, size=2, command_timeout=timeout)
        return self._pool

    def close(self) -> None:
        """Drop its connections."""
        if self._pool is not None:
            self._pool.terminate()


def cannot_reach(error: BaseException) -> str:
    """Return what to tell whoever asked when the database could not be reached."""
    return f"cannot reach PostgreSQL: {error or type(error).__name__}; `millpond doctor` says what to do"


async def _prepare(connection: asyncpg.Connection) -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: _JSONB_VERSION + orjson.dumps(value),
        decoder=lambda stored: _loads(stored),
        format="binary",  # COPY has no other
    )


def _loads(stored: bytes) -> Any:
    return orjson.loads(stored[1:])
