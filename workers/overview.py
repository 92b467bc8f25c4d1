"""What a deployment looks like from outside: counters, queues, workers. Read by `millpond stats` and `doctor`.

Reading takes a handful of round trips and never blocks the server; it changes nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import orjson
import redis

from shared import keys
from shared.keys import PartitionKeys
from shared.rounding import rounded
from shared.settings import Settings

_TIERS = ("hit.l1", "hit.l2", "collapsed", "miss")
#: Shown where there were any.
_RARER_TIERS = ("hit.l3", "led", "stale_if_error")
_CONNECT_TIMEOUT = 3.0
_SCAN_COUNT = 5000


@dataclass(frozen=True, slots=True)
class Queue:
    """One consumer group of one stream. `waiting` are not yet delivered (None: the server cannot tell)."""

    partition: int
    stream: str
    group: str
    length: int
    pending: int
    waiting: int | None
    consumers: int
    #: pending messages of consumers whose worker no longer beats its heart
    orphaned: int


@dataclass(frozen=True, slots=True)
class Overview:
    """One look at a deployment. `partitions` is 0 while none is recorded.

    `backlog` is the age in seconds of the oldest answer that waits for PostgreSQL, per partition; 0 when none does.
    """

    partitions: int
    counters: dict[str, int]
    queues: list[Queue]
    lengths: list[dict[str, int]]
    workers: list[dict[str, Any]]
    backlog: list[float]

    @property
    def rates(self) -> dict[str, float]:
        """Share of the answered requests by tier, each from 0 to 1; empty before the first."""
        tiers = (*_TIERS, *(name for name in _RARER_TIERS if name in self.counters))
        total = sum(self.counters.get(name, 0) for name in tiers)
        return {name: self.counters.get(name, 0) / total for name in tiers} if total else {}

    @property
    def dead(self) -> int:
        """The number of dead letters."""
        return sum(lengths["dead"] for lengths in self.lengths)

    def as_json(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {
            "partitions": self.partitions,
            "counters": self.counters,
            "rates": {name: round(rate, 4) for name, rate in self.rates.items()},
            "queues": [asdict(queue) for queue in self.queues],
            "streams": [
                {"partition": at, **lengths, "landed_seconds": round(self.backlog[at], 1)}
                for at, lengths in enumerate(self.lengths)
            ],
            "workers": [rounded(worker) for worker in self.workers],
        }


def connect(url: str) -> redis.Redis:
    """Return a connection for an operator's command; it gives up after a few seconds."""
    connection: redis.Redis = redis.Redis.from_url(
        url, socket_connect_timeout=_CONNECT_TIMEOUT, socket_timeout=30.0, client_name="millpond-cli"
    )
    return connection


def recorded_partitions(connection: redis.Redis) -> int:
    """Return the number of partitions the deployment was born with, 0 before its first start."""
    return int(connection.execute_command("HGET", keys.DEPLOYMENT, "partitions") or 0)


def partitions_in_use(connection: redis.Redis, settings: Settings) -> int:
    """Return the recorded number of partitions, else the configured one, else 1."""
    return recorded_partitions(connection) or settings.partitions or 1


def look(connection: redis.Redis) -> Overview:
    """Return how the deployment stands now."""
    partitions = recorded_partitions(connection)
    counted = connection.execute_command("HGETALL", keys.STATS)
    workers = _workers(connection)
    alive = {str(worker["name"]) for worker in workers}
    queues: list[Queue] = []
    lengths: list[dict[str, int]] = []
    backlog: list[float] = []
    for names in map(PartitionKeys, range(partitions)):
        lengths.append(_lengths(connection, names))
        backlog.append(_oldest(connection, names.landed))
        for stream in names.read_in_groups:
            queues += _queues(connection, names.partition, stream, alive)
    return Overview(
        partitions=partitions,
        counters={name.decode(): int(value) for name, value in sorted(counted.items())},
        queues=queues,
        lengths=lengths,
        workers=workers,
        backlog=backlog,
    )


def _lengths(connection: redis.Redis, names: PartitionKeys) -> dict[str, int]:
    pipe = connection.pipeline(transaction=False)
    streams = (*names.read_in_groups, names.dead)
    for stream in streams:
        pipe.execute_command("XLEN", stream)
    return {_short(stream): int(length) for stream, length in zip(streams, pipe.execute(), strict=True)}


def _oldest(connection: redis.Redis, stream: str) -> float:
    first = connection.execute_command("XRANGE", stream, "-", "+", "COUNT", 1)
    if not first:
        return 0.0
    seconds, microseconds = connection.execute_command("TIME")
    return max(0.0, int(seconds) + int(microseconds) / 1e6 - int(first[0][0].partition(b"-")[0]) / 1000)


def _queues(connection: redis.Redis, partition: int, stream: str, alive: set[str]) -> list[Queue]:
    try:
        groups = connection.execute_command("XINFO GROUPS", stream)
        length = int(connection.execute_command("XLEN", stream))
    except redis.ResponseError:  # no such stream yet
        return []
    queues = []
    for group in groups:
        name = _text(group["name"])
        consumers = connection.execute_command("XINFO CONSUMERS", stream, name)
        queues.append(
            Queue(
                partition=partition,
                stream=_short(stream),
                group=name,
                length=length,
                pending=int(group["pending"]),
                waiting=None if group.get("lag") is None else int(group["lag"]),
                consumers=len(consumers),
                orphaned=sum(int(c["pending"]) for c in consumers if _text(c["name"]) not in alive),
            )
        )
    return queues


def _workers(connection: redis.Redis) -> list[dict[str, Any]]:
    found = connection.scan_iter(match=keys.worker("*"), count=_SCAN_COUNT)
    names = sorted({bytes(name) for name in found})
    beats = connection.execute_command("MGET", *names) if names else []
    workers: list[dict[str, Any]] = [orjson.loads(beat) for beat in beats if beat]  # one may just have ended
    return sorted(workers, key=lambda worker: (str(worker.get("kind")), str(worker.get("name"))))


def _short(stream: str) -> str:
    return stream.rpartition(":")[2]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
