"""PostgreSQL as the consumers of one process see it: there, or away.

Away is whatever is no row's own fault: a server that is down, restarts, is full, refuses, was never migrated. What
was to be written is then kept and tried again, for as long as it takes; nothing is given up for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg

from shared.database import DATABASE_ERRORS, connect_pool, resolve_database_url
from shared.settings import Settings
from shared.tiers.l3 import L3
from workers.crew import Crew

log = logging.getLogger("millpond.worker")

T = TypeVar("T")
#: What says that a row is at fault, not the server.
ROW_ERRORS = (
    asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError,
)  # fmt: skip
#: Seconds that a transaction, or coming by a connection, may take.
_LONGEST = 30.0
_DAYS_AHEAD = 2
_NAME = "millpond-persistence"
_END_FROZEN = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = $1 AND datname = current_database() AND xact_start IS NOT NULL
      AND wait_event = 'ClientRead' AND state_change < now() - make_interval(secs => $2)"""


class Away(Exception):
    """PostgreSQL cannot take it now; whether it took it is not known."""


class Database:
    """A few connections that the consumers of one process share; one trouble is logged once for all of them."""

    def __init__(self, settings: Settings, *, size: int) -> None:
        self._settings = settings
        self._size = size
        self._pool: Any = None
        self._connecting = asyncio.Lock()
        self._looking = asyncio.Lock()
        self._seen = False
        self._away_since: float | None = None

    @property
    def away(self) -> bool:
        """Whether the last that was tried failed, or nothing was tried yet."""
        return not self._seen or self._away_since is not None

    async def run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """Run `work` with a connection, in one transaction; whatever goes wrong with it ends both.

        Raises:
            Away: the server is; the work may or may not have been committed, and has to bear being repeated.
            asyncpg.PostgresError: one of `ROW_ERRORS`: a row is at fault.
        """
        try:
            try:
                found = await self._run(work)
            except asyncpg.LockNotAvailableError:
                await self._run(self._end_frozen)
                raise
            except asyncpg.CheckViolationError as error:
                if error.constraint_name is not None:
                    raise
                # Its day got its partition while it waited for the default one's lock: now it goes there.
                found = await self._run(work)
        except ROW_ERRORS:
            raise
        except DATABASE_ERRORS as error:
            self._is_away(error)
            raise Away(str(error)) from error
        self._seen = True
        if self._away_since is not None:
            log.warning("PostgreSQL is back after %.1f s", time.monotonic() - self._away_since)
            self._away_since = None
        return found

    async def look(self) -> None:
        """See whether the server is there, and give it the partitions of the next days; one look at a time.

        Raises:
            Away: it is not.
        """
        async with self._looking:
            if self.away:
                await self.run(_ensure_partitions)

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            self._pool.terminate()

    async def _run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        async with asyncio.timeout(_LONGEST):
            pool = await self._connected()
            connection = await pool.acquire()
            try:
                return await _in_transaction(connection, work)
            except ROW_ERRORS:
                raise
            except BaseException:
                # Neither rolled back nor handed back: a server that does not answer would not answer that either.
                with contextlib.suppress(asyncpg.InterfaceError):  # the server closed it: it has left the pool already
                    connection.terminate()
                raise
            finally:
                await pool.release(connection)

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._pool is None:
                # A worker that is frozen in the middle of a transaction would keep its locks: whoever takes over its
                # messages, and a pruning, would wait for it for ever.
                lease_ms = str(int(self._settings.background_lease * 1000))
                self._pool = await connect_pool(
                    self._settings,
                    name=_NAME,
                    size=self._size,
                    idle_in_transaction_session_timeout=lease_ms,
                    lock_timeout=lease_ms,
                )
            return self._pool

    async def _end_frozen(self, connection: Any) -> None:
        """End transactions that are idle in the middle of a message: that is no idleness to PostgreSQL."""
        await connection.execute(_END_FROZEN, _NAME, self._settings.background_lease)

    def _is_away(self, error: BaseException) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            what = str(error) or type(error).__name__
            log.warning("PostgreSQL is away (%s); what it should get waits in Redis", what)


class OneL3:
    """The L3 that all consumers of one process share, made for the first of them."""

    def __init__(self, settings: Settings, *, timeout: float, connections: int = 4) -> None:
        self._settings = settings
        self._timeout = timeout
        self._connections = connections
        self._made: L3 | None = None

    def of(self, crew: Crew) -> L3 | None:
        """Return it; None where there is no PostgreSQL."""
        if self._made is None and (url := resolve_database_url(self._settings)) is not None:
            self._made = L3(url, crew.counters, timeout=self._timeout, connections=self._connections)
        return self._made

    async def close(self) -> None:
        """Close its connections."""
        if self._made is not None:
            await self._made.close()


async def _in_transaction(connection: Any, work: Callable[[Any], Awaitable[T]]) -> T:
    transaction = connection.transaction()
    await transaction.start()
    try:
        found = await work(connection)
        await transaction.commit()
    except ROW_ERRORS:
        await transaction.rollback()
        raise
    return found


async def _ensure_partitions(connection: Any) -> None:
    await connection.execute("SELECT ensure_partitions($1)", _DAYS_AHEAD)
