"""What the scheduled jobs of one process work with."""

from __future__ import annotations

from typing import Any

from asyncpg import Pool

from shared import postgres
from shared.database import LatePool
from shared.errors import Unavailable
from shared.link import Link
from shared.settings import Settings

Result = dict[str, Any]


class Desk:
    """Connections and facts for jobs. `partitions` is the deployment's number of them.

    `by_hand`: somebody waits for what the job does, so that it fails for want of a database and is not merely skipped.
    """

    def __init__(self, url: str, settings: Settings, partitions: int, *, by_hand: bool = False) -> None:
        self.url = url
        self.settings = settings
        self.partitions = partitions
        self.by_hand = by_hand
        self.link = Link(url, name="millpond-schedule")
        self._database = LatePool(settings, name="millpond-schedule", command_timeout=None)

    async def database(self) -> Pool | None:
        """Return connections to PostgreSQL, made as they are needed; None where the deployment has no database.

        Raises:
            Unavailable: it has one that was started here, and does not answer.
        """
        pool = await self._database.get()
        if pool is None and self.settings.l3 and postgres.was_started(self.settings.data_dir):
            raise Unavailable(postgres.missing(self.settings.data_dir))
        return pool

    def without_database(self) -> Result:
        """Return what a job that needs a database came to without one.

        Raises:
            Unavailable: the deployment should have one, and somebody waits for the job.
        """
        if not self.settings.l3:
            return {"skipped": "MILLPOND_L3=false does without PostgreSQL"}
        if self.by_hand:
            raise Unavailable(postgres.missing(self.settings.data_dir))
        return {"skipped": postgres.missing(self.settings.data_dir)}

    async def close(self) -> None:
        """Let all connections go."""
        await self.link.close()
        self._database.close()
