"""Answers laid into L2 and L3 by hand, and what is left of them: what the tests of sweeping and pruning work with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from producers.client import Client
from shared.keys import INVALIDATION_GROUP, PartitionKeys
from tests.databases import Database
from tests.faults_support import Pond, until
from tests.shelf import DAY_MS, GENESIS, Shelf, key

_ROW = """
INSERT INTO answers (key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile, tenant, model,
                     bytes, entry)
VALUES ($1, $2, $3, $4, now(), now() + interval '1 day', now() + interval '1 day', now() + interval '1 day', $5,
        'response', 'default', 'm', $6, $7)
"""


class Stock(Shelf):
    """The answers of a deployment, in two tiers."""

    def __init__(self, pond: Pond, database: Database) -> None:
        super().__init__(pond)
        self.database = database
        for names in pond.all_names():
            if not pond.redis.exists(names.invalidations):
                pond.redis.xadd(names.invalidations, {"by": "genesis", "tags": ""}, id=GENESIS)

    async def store(self, number: int, *tags: str, epoch: str = GENESIS) -> None:
        """Lay an answer into both tiers."""
        self.put(number, *tags, left_ms=DAY_MS, epoch=epoch)
        await self.persist(number, *tags, epoch=epoch)

    async def persist(self, number: int, *tags: str, epoch: str = GENESIS) -> None:
        """Lay an answer into L3."""
        text = self.text(*tags, epoch=epoch)
        ms, seq = map(int, epoch.split("-"))
        labels = ["profile:response", "tenant:default", "model:m", *tags]
        where = self.names(number).partition
        await self.database.fetch(_ROW, bytes.fromhex(key(number)), where, ms, seq, labels, len(text), text)

    async def clear(self) -> None:
        """Take everything away."""
        if names := self.pond.found("{mp:*}:entry:*"):
            self.redis.unlink(*names)
        await self.database.fetch("DELETE FROM answers")

    def newest(self, number: int) -> str:
        """Return the newest invalidation of that answer's partition."""
        found: bytes = self.redis.hget(self.names(number).tags, "#last")
        return found.decode()

    def left_in_l2(self) -> set[int]:
        """Return which answers Redis still holds."""
        return {int(name.rpartition(b":")[2][:8], 16) for name in self.pond.found("{mp:*}:entry:*")}

    async def left_in_l3(self) -> set[int]:
        """Return which answers PostgreSQL still holds."""
        return {int(row["key"].hex()[:8], 16) for row in await self.database.fetch("SELECT key FROM answers")}

    async def left(self) -> set[int]:
        """Return which answers are left; both tiers must hold the same."""
        in_l2, in_l3 = self.left_in_l2(), await self.left_in_l3()
        assert in_l2 == in_l3
        return in_l2

    async def audit(self) -> list[dict[str, Any]]:
        """Return the audit, oldest first."""
        rows = await self.database.fetch("SELECT * FROM invalidations ORDER BY at, partition")
        return [dict(row) for row in rows]

    async def worked_off(self) -> None:
        """Wait until every entry of the log was read and acknowledged."""
        await until(lambda: all(map(self._is_worked_off, self.pond.all_names())), "the log is worked off")

    def _is_worked_off(self, names: PartitionKeys) -> bool:
        newest = self.redis.xinfo_stream(names.invalidations)["last-generated-id"]
        groups = {group["name"].decode(): group for group in self.redis.xinfo_groups(names.invalidations)}
        group = groups.get(INVALIDATION_GROUP)
        return group is not None and not group["pending"] and group["last-delivered-id"] == newest


async def eventually(condition: Callable[[], Awaitable[object]], what: str, timeout: float = 15.0) -> None:
    """As `until`, for a condition that has to be awaited."""
    deadline = time.monotonic() + timeout
    while not await condition():
        assert time.monotonic() < deadline, f"after {timeout} s still not: {what}"
        await asyncio.sleep(0.02)


async def forget(client: Client, **what: Any) -> tuple[int | None, int | None]:
    """Invalidate, wait for the sweep, return what it deleted from L2 and L3."""
    found = await client.invalidate(wait=20.0, **what)
    assert found.complete, "nobody swept"
    return found.l2, found.l3
