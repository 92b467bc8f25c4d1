"""What the scheduled jobs of one process work with."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

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
        self._pool: Any = None
        self._opening = asyncio.Lock()

    async def database(self) -> Any:
        """Return a pool of connections to PostgreSQL, opened at first use; None where the deployment has none.

        Raises:
            Unavailable: it has one that does not answer.
        """
        database = import_module("shared.database")
        async with self._opening:
            if self._pool is None:
                url = database.resolve_database_url(self.settings)
                if url is not None:
                    self._pool = await database.connect_pool(url, size=2)
            return self._pool

    async def close(self) -> None:
        """Let all connections go."""
        await self.link.close()
        if self._pool is not None:
            self._pool.terminate()
