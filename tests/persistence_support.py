"""What the tests of the durable tier's writer share: messages as the workers send them, and looks at the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg
import orjson

from shared.entry import pack
from shared.keys import PERSISTENCE_GROUP, PartitionKeys, partition_of
from shared.touches import BOUNDS
from tests.faults_support import Pond

HOUR_MS = 3_600_000
#: Every table the persistence worker writes.
TABLES = ("answers", "calls", "hits", "top_keys", "applied", "experiments")


def key_of(number: int) -> str:
    """Return the cache key of a made-up answer; consecutive ones fall into different partitions."""
    return f"{number:08x}{number:024x}"


def entry_of(
    number: int = 0,
    *,
    epoch: str = "1-0",
    created_ms: int = 1_760_000_000_000,
    tags: Sequence[str] = (),
    body: str = "x",
) -> bytes:
    """Return an entry as `land` composes it."""
    labels = [*tags, "profile:response", "tenant:default", "model:m"]
    meta, packed = pack(
        orjson.dumps({"answer": number, "text": body}), model="m", compute_ms=7, compress_above=256,
        provider="simulated", tokens=(10, 20), cost=0.5,
    )  # fmt: skip
    head = f"mp2 {epoch} {created_ms} 60000 1000 2000 {len(labels)}\n" + "".join(f"{label}\n" for label in labels)
    return head.encode() + meta + b"\n" + packed


def call_of(**changes: Any) -> bytes:
    """Return the call of a message of `landed`."""
    call = {
        "profile": "response", "tenant": "default", "experiment": None, "variant": None, "model": "m",
        "endpoint": "chat", "provider": "simulated", "tokens": [10, 20], "cost": 0.5, "duration_ms": 7,
    }  # fmt: skip
    return orjson.dumps(call | changes)


def land(pond: Pond, number: int, **fields: Any) -> bytes:
    """Add a message to `landed` of the partition its key belongs to; a field that is None is left out."""
    said = {"key": key_of(number), "outcome": "stored", "call": call_of(), "entry": entry_of(number)} | fields
    names = PartitionKeys(partition_of(key_of(number), pond.partitions))
    sent: bytes = pond.redis.execute_command(
        "XADD", names.landed, "*", *(part for pair in said.items() if pair[1] is not None for part in pair)
    )
    return sent


def touch(
    pond: Pond, hits: int = 1, *, keys: Sequence[int] = (), tier: str = "l1", partition: int = 0, **changes: Any
) -> bytes:
    """Add a report of hits to `touches`."""
    about = {"tenant": "default", "experiment": None, "variant": None, "cost": 0.25, "saved_ms": 100} | changes
    histogram = [hits] + [0] * len(BOUNDS)
    row = [
        tier, "response", about["tenant"], "m", about["experiment"], about["variant"], hits, 10 * hits, 20 * hits,
        about["cost"], about["saved_ms"], histogram,
    ]  # fmt: skip
    data = {"keys": {key_of(n): [hits, 0, 0] for n in keys}, "stats": [row]}
    sent: bytes = pond.redis.execute_command("XADD", PartitionKeys(partition).touches, "*", "data", orjson.dumps(data))
    return sent


async def rows(url: str, query: str, *values: Any) -> list[Any]:
    """Return what a query finds, as plain tuples."""
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(query, *values)]
    finally:
        await connection.close()


async def count(url: str, table: str) -> int:
    """Return how many rows a table has."""
    ((found,),) = await rows(url, f"SELECT count(*) FROM {table}")
    return int(found)


def is_written(pond: Pond) -> bool:
    """Whether nothing of either stream waits for the persistence workers."""
    return not pond.length("landed") and not pond.pending("touches") and not lag(pond, "touches")


def lag(pond: Pond, stream: str) -> int:
    """Return the messages of one kind of stream that were not delivered to the persistence group yet."""
    behind = 0
    for names in pond.all_names():
        name = getattr(names, stream)
        for group in pond.redis.xinfo_groups(name) if pond.redis.exists(name) else ():
            if group["name"] == b"persistence":
                last = group["last-delivered-id"].decode()
                behind += len(pond.redis.execute_command("XRANGE", name, f"({last}", "+"))
    return behind


def owners(pond: Pond, stream: str) -> set[str]:
    """Return who holds the delivered messages of one kind of stream."""
    return {owner for owner, _ in pond.in_hand(stream, PERSISTENCE_GROUP).values()}


def held_by(pond: Pond, stream: str, name: str) -> dict[tuple[int, bytes], int]:
    """Return the messages of one kind of stream that a consumer holds, and how often each was delivered."""
    held = pond.in_hand(stream, PERSISTENCE_GROUP).items()
    return {message: deliveries for message, (owner, deliveries) in held if owner == name}
