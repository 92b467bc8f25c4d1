"""What the scheduled jobs of one process work with."""

from __future__ import annotations

from typing import Any

from asyncpg import Pool

from shared.database import LatePool
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
        self._database = LatePool(settings, name="millpond-schedule", command_timeout=None)

    async def database(self) -> Pool | None:
        """Return connections to PostgreSQL, made as they are needed; None where the deployment has no database."""
        return await self._database.get()

    async def close(self) -> None:
        """Let all connections go."""
        await self.link.close()
        self._database.close()
