"""Entries of any age in L2, and reports of their hits: what the promotion tests work with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import asyncpg
import orjson

from shared.entry import pack, unpack
from shared.keys import PROMOTION_GROUP, PartitionKeys, partition_of
from tests.faults_support import Pond, until

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
#: The probation of the profile `response`.
PROBATION_MS = 600_000
GENESIS = "1-0"


def key(number: int) -> str:
    """Return a cache key; consecutive ones fall into consecutive partitions."""
    return f"{number:08x}{'0' * 24}"


class Shelf:
    """The entries of a deployment."""

    def __init__(self, pond: Pond) -> None:
        self.redis = pond.redis
        self.pond = pond
        for names in pond.all_names():  # a log that has begun: what has its epoch is of this life
            self.redis.hset(names.tags, "#last", GENESIS)

    def names(self, number: int) -> PartitionKeys:
        """Return the key names of that key's partition."""
        return PartitionKeys(partition_of(key(number), self.pond.partitions))

    def text(
        self, *tags: str, age_ms: int = 0, ttl_ms: int = DAY_MS, epoch: str = GENESIS, body: bytes = b"{}"
    ) -> bytes:
        """Return an entry computed `age_ms` ago."""
        meta, packed = pack(body, model="m", compute_ms=1, compress_above=1 << 20, provider="p")
        labels = ("profile:response", "tenant:default", "model:m", *tags)
        first = f"mp2 {epoch} {self.pond.now_ms() - age_ms} {ttl_ms} 0 0 {len(labels)}"
        return "\n".join((first, *labels, "")).encode() + meta + b"\n" + packed

    def put(self, number: int, *tags: str, left_ms: int = PROBATION_MS, **entry: Any) -> bytes:
        """Lay an entry into L2 that leaves it in `left_ms`."""
        text = self.text(*tags, **entry)
        self.redis.set(self.names(number).entry(key(number)), text, px=left_ms)
        return text

    def get(self, number: int) -> bytes | None:
        """Return the entry in L2, if any."""
        found: bytes | None = self.redis.get(self.names(number).entry(key(number)))
        return found

    def left_ms(self, number: int) -> int:
        """Return how long the entry stays in L2; negative: it is not there."""
        return int(self.redis.pttl(self.names(number).entry(key(number))))

    def leaves_at(self, number: int) -> int:
        """Return the moment when the entry leaves L2."""
        return int(self.redis.execute_command("PEXPIRETIME", self.names(number).entry(key(number))))

    def report(self, hits: Mapping[int, list[int]], *, at: str = "*") -> None:
        """Report hits (of L1, L2, L3) of some keys of one partition, as a lookup worker does."""
        names = self.names(next(iter(hits)))
        data = orjson.dumps({"keys": {key(number): counts for number, counts in hits.items()}, "stats": []})
        self.redis.xadd(names.touches, {"data": data}, id=at)

    def invalidate(self, number: int, *tags: str) -> None:
        """Mark tags as invalidated just now."""
        now = f"{int(time.time() * 1000)}-0"
        self.redis.hset(self.names(number).tags, mapping={"#last": now} | dict.fromkeys(tags, now))

    async def keep(self, url: str, number: int, text: bytes) -> None:
        """Store an entry in PostgreSQL, as the persistence worker does."""
        entry = unpack(key(number), text)
        epoch_ms, epoch_seq = (int(part) for part in entry.epoch.split("-"))
        times = [
            datetime.fromtimestamp(ms / 1000, UTC)
            for ms in (entry.created_ms, entry.fresh_ms, entry.expires_ms, entry.gone_ms)
        ]
        row = {
            "key": bytes.fromhex(key(number)), "partition": self.names(number).partition, "epoch_ms": epoch_ms,
            "epoch_seq": epoch_seq, "created": times[0], "fresh": times[1], "expires": times[2], "gone": times[3],
            "tags": list(entry.tags), "profile": "response", "tenant": "default", "model": "m", "provider": "p",
            "prompt_tokens": 1, "completion_tokens": 1, "compute_ms": 1, "bytes": len(text), "entry": text,
        }  # fmt: skip
        connection = await asyncpg.connect(url)
        try:
            places = ", ".join(f"${n + 1}" for n in range(len(row)))
            await connection.execute(f"INSERT INTO answers ({', '.join(row)}) VALUES ({places})", *row.values())
        finally:
            await connection.close()

    async def handled(self) -> None:
        """Wait until every report was read and acknowledged."""
        await until(self._is_handled, "the reports are handled")

    def _is_handled(self) -> bool:
        for names in self.pond.all_names():
            if not self.redis.exists(names.touches):
                continue
            newest = self.redis.xinfo_stream(names.touches)["last-generated-id"]
            for group in self.redis.xinfo_groups(names.touches):
                if group["name"].decode() == PROMOTION_GROUP and (
                    group["pending"] or group["last-delivered-id"] != newest
                ):
                    return False
        return True
