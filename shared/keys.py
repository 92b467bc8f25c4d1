"""Every Redis key name, in one place.

A key of partition *p* carries the hash tag `{mp:p}`, so one script can touch all of them on Redis Cluster too.
Keys outside a partition (`mp:…`) are never touched together with another key.
"""

from __future__ import annotations

DEPLOYMENT = "mp:deployment"
"""Hash: what the deployment was born with (`partitions`, `schema`). No TTL."""

STATS = "mp:stats"
"""Hash: counters of all workers since birth. No TTL."""

LIMIT_PREFIX = "mp:limit"
"""Prefix of the pool's rate limit windows (strings, TTL of two windows); the `limits` library names the rest."""

PRESSURE = "mp:pressure"
"""String: present (with a TTL) while Redis' memory is above its mark."""

BREAKER_PREFIX = "mp:breaker"
"""Prefix of the provider circuits' keys."""

SCHEDULE_PREFIX = "mp:arq"
"""Prefix of arq's queue and jobs."""

LOOKUP_GROUP = "lookup"
LLM_GROUP = "llm"
PERSISTENCE_GROUP = "persistence"
PROMOTION_GROUP = "promotion"
INVALIDATION_GROUP = "invalidation"


def reply(client: str) -> str:
    """Stream: the reply channel of one client; created, renewed and trimmed by that client."""
    return f"mp:reply:{client}"


def schedule(name: str) -> str:
    """String: what the last run of one scheduled job came to, JSON, kept for a week."""
    return f"mp:schedule:{name}"


def worker(name: str) -> str:
    """String: heartbeat of one worker process, JSON, expires when the worker stops renewing it."""
    return f"mp:worker:{name}"


class PartitionKeys:
    """The names of one partition's keys."""

    __slots__ = (
        "dead", "entry_prefix", "failed_prefix", "fills", "flight_prefix", "invalidations", "landed", "outcome_prefix",
        "partition", "refreshes", "requests", "swept_prefix", "tags", "touches", "waiters_prefix",
    )  # fmt: skip

    def __init__(self, partition: int) -> None:
        tag = f"{{mp:{partition}}}"
        self.partition = partition
        self.requests = f"{tag}:requests"
        self.fills = f"{tag}:fills"
        self.refreshes = f"{tag}:refreshes"
        self.landed = f"{tag}:landed"
        self.touches = f"{tag}:touches"
        self.invalidations = f"{tag}:invalidations"
        self.dead = f"{tag}:dead"
        self.tags = f"{tag}:tags"
        self.entry_prefix = f"{tag}:entry:"
        self.flight_prefix = f"{tag}:flight:"
        self.waiters_prefix = f"{tag}:waiters:"
        self.outcome_prefix = f"{tag}:outcome:"
        self.failed_prefix = f"{tag}:failed:"
        self.swept_prefix = f"{tag}:swept:"

    @property
    def read_in_groups(self) -> tuple[str, ...]:
        """The streams that consumer groups read."""
        return (self.requests, self.fills, self.refreshes, self.landed, self.touches, self.invalidations)

    def entry(self, key: str) -> str:
        """String: the L2 entry, PX: its probation, its promoted life, at most its hard expiry and `stale_if_error`."""
        return self.entry_prefix + key

    def flight(self, key: str) -> str:
        """Hash: the live flight of a key (token, epoch, tags, ttl, store)."""
        return self.flight_prefix + key

    def waiters(self, key: str, token: str) -> str:
        """List: who waits for one flight."""
        return f"{self.waiters_prefix}{key}:{token}"

    def outcome(self, key: str, token: str) -> str:
        """String: what a flight came to, kept from landing until every waiter was told."""
        return f"{self.outcome_prefix}{key}:{token}"

    def failed(self, key: str) -> str:
        """String: the provider's last error for a key, answered until its time is up."""
        return self.failed_prefix + key

    def swept(self, entry_id: str) -> str:
        """Hash: what one invalidation physically deleted, per tier; kept for an hour."""
        return self.swept_prefix + entry_id


def partition_of(key: str, partitions: int) -> int:
    """Return the partition of a cache key: its first 32 bits modulo the number of partitions."""
    return int(key[:8], 16) % partitions if partitions > 1 else 0
