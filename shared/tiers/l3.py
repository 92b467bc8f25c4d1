"""L3: every answer ever computed, in PostgreSQL, as lookup workers read it: many keys in one bounded query.

What it finds is never answered straight: the caller has `rehydrate` judge it by the markers and write it back into L2.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.counters import Counters

if TYPE_CHECKING:
    from asyncpg import Pool, Record

log = logging.getLogger("millpond.l3")

_FIND = "SELECT key, entry FROM answers WHERE key = ANY($1::bytea[]) AND gone > now()"
#: Seconds for which L3 is left alone after its n-th failure in a row.
_PAUSES = (0.5, 1.0, 2.0, 5.0)


class L3:
    """The durable tier, behind a time-out and a circuit breaker: while PostgreSQL is away, lookups do without it."""

    def __init__(self, url: str, counters: Counters, *, timeout: float, connections: int = 4) -> None:
        self._url = url
        self._counters = counters
        self._timeout = timeout
        self._connections = connections
        self._pool: Pool | None = None
        self._opening: asyncio.Task[None] | None = None
        self._failures = 0
        self._closed_until = 0.0

    @property
    def open(self) -> bool:
        """Whether it is worth asking now."""
        return time.monotonic() >= self._closed_until

    async def find(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the stored envelopes of these cache keys; nothing while PostgreSQL fails or is too slow."""
        if not keys or not self.open:
            return {}
        try:
            async with asyncio.timeout(self._timeout):
                rows = await self._fetch([bytes.fromhex(key) for key in keys])
        except Exception as error:  # whatever it is: the lookup goes on without this tier
            self._failed(error)
            return {}
        if self._failures:
            log.warning("PostgreSQL answers again")
        self._failures = 0
        return {row[0].hex(): row[1] for row in rows}

    async def close(self) -> None:
        """Give up the connections."""
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()

    async def _fetch(self, keys: list[bytes]) -> list[Record]:
        pool = await self._connected()
        connection = await pool.acquire()
        try:
            rows: list[Record] = await connection.fetch(_FIND, keys)
            return rows
        except BaseException:
            # A silent server does not answer asyncpg's request to cancel either, and `release` would wait for that.
            connection.terminate()
            raise
        finally:
            await pool.release(connection)

    async def _connected(self) -> Pool:
        if self._pool is None:
            if self._opening is None:
                self._opening = asyncio.create_task(self._open_pool())
            # Shielded: opening may take longer than one lookup may wait.
            await asyncio.shield(self._opening)
        assert self._pool is not None  # noqa: S101 (opened)
        return self._pool

    async def _open_pool(self) -> None:
        from shared.database import connect_pool

        try:
            self._pool = await connect_pool(
                self._url,
                name="millpond-lookup",
                size=self._connections,
                min_size=1,
                statement_timeout=str(max(1, int(self._timeout * 1000))),
            )
        finally:
            self._opening = None

    def _failed(self, error: Exception) -> None:
        pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
        self._failures += 1
        self._counters.add("l3_failures")
        self._closed_until = time.monotonic() + pause
        log.warning("PostgreSQL does not answer (%r): lookups do without it for %.1f s", error, pause)
