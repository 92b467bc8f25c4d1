"""What the scheduled jobs of one process work with."""

from __future__ import annotations

import asyncio
from typing import Any

from asyncpg import Pool

from shared.database import connect_pool, resolve_database_url
from shared.link import Link
from shared.settings import Settings

Result = dict[str, Any]


class Desk:
    """Connections and facts for jobs. `partitions` is the deployment's number of them."""

    def __init__(self, url: str, settings: Settings, partitions: int) -> None:
        self.url = url
        self.settings = settings
        self.partitions = partitions
        self.link = Link(url, name="millpond-schedule")
        self._pool: Pool | None = None
        self._opening = asyncio.Lock()

    async def database(self) -> Pool | None:
        """Return connections to PostgreSQL, made as they are needed; None where the deployment has no database."""
        async with self._opening:
            if self._pool is None:
                url = resolve_database_url(self.settings)
                if url is not None:
                    self._pool = await connect_pool(url, name="millpond-schedule", size=2, command_timeout=None)
            return self._pool

    async def close(self) -> None:
        """Let all connections go."""
        await self.link.close()
        if self._pool is not None:
            self._pool.terminate()
