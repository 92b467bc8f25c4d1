"""The promotion worker: what proves popular stays in L2, and comes back to it from L3.

A new answer is on probation: it leaves Redis early unless it is hit. Hits in any tier, L1 included, are reported in
`touches`; each prolongs the entry's life in L2 by `life_ms`, up to the answer's own end. Hit keys that L2 no longer
holds are asked of PostgreSQL, all of a batch in one query, and written back where no invalidation forbids it. Without
PostgreSQL nothing is written back, and nothing is on probation either.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from shared import keys
from shared.entry import Entry, unpack
from shared.envelope import Unreadable
from shared.faults import fault_point
from shared.keys import PartitionKeys, partition_of
from shared.link import Command, Link
from shared.profiles import DEFAULT_PROFILE, Profile
from shared.scripts import SCRIPTS, Arg
from shared.settings import Settings
from shared.tiers import l2
from workers.consumer import Consumer, Message, in_order, messages_of, server_ms
from workers.crew import Crew
from workers.database import OneL3
from workers.runtime import run_crew

if TYPE_CHECKING:
    from asyncpg import Pool

log = logging.getLogger("millpond.worker")

#: Reports read at once, and keys in one call of a script: Redis does nothing else meanwhile.
_BATCH = 16
_AT_ONCE = 200
#: Answers asked of PostgreSQL, and written back, at once; the most often hit ones first.
_MOST_ABSENT = 500
_WRITTEN_AT_ONCE = 50
#: How much of a life is granted while Redis is short of memory.
_UNDER_PRESSURE = 0.1
_KEY_LENGTH = 32
#: Seconds to wait for PostgreSQL: nobody else does.
_PATIENCE = 2.0
_HOUR_MS = 3_600_000

_FIND = "SELECT key, entry FROM answers WHERE key = ANY($1::bytea[]) AND gone > now()"
_TOP = """
SELECT key, max(hour) FROM top_keys WHERE hour > now() - $1::interval GROUP BY key ORDER BY sum(hits) DESC LIMIT $2
"""


class Finder(Protocol):
    """Where answers are kept for good."""

    async def find(self, keys: Sequence[str], /) -> dict[str, bytes]:
        """Return the stored entries of these cache keys that may still be served; nothing while it is away."""


def weight(hits: int) -> float:
    """Return by how much `hits` reported together count for more than one: 1 + log2."""
    return 1.0 + math.log2(max(1, hits))


def life_ms(age_ms: int, hits: int, probation_ms: int) -> int:
    """Return how long an entry of that age lives in L2 from a hit on, in milliseconds.

    As long again as it has lived, and the probation on top: what was asked for an hour after it was computed may be
    asked for an hour later. Popularity is heavy-tailed, so the longer something has been wanted, the longer it will
    be (the adaptive time to live of the Alex file system, Cate 1992; RFC 9111 section 4.2.2 has the same idea). It
    needs no counter: a key's hits at ever greater age are the counter. Several hits at once count logarithmically.
    """
    return int(weight(hits) * (probation_ms + max(0, age_ms)))


@dataclass(slots=True)
class Hits:
    """The hits of one key: how many, and when the newest was reported (ms of the server's clock)."""

    count: int = 0
    at_ms: int = 0

    def add(self, count: int, at_ms: int) -> None:
        """Count more of them."""
        self.count += count
        self.at_ms = max(self.at_ms, at_ms)


def hits_of(messages: Iterable[Message]) -> tuple[dict[str, Hits], int]:
    """Return the hits per key of these reports, and how many reports could not be read."""
    found: dict[str, Hits] = {}
    unreadable = 0
    for message in messages:
        at_ms = int(message.id.split(b"-")[0])
        try:
            for key, counts in orjson.loads(message.fields[b"data"]).get("keys", {}).items():
                count = sum(counts)
                if len(key) == _KEY_LENGTH and bytes.fromhex(key) and count > 0:
                    found.setdefault(key, Hits()).add(count, at_ms)
        except (KeyError, ValueError, TypeError, AttributeError):
            unreadable += 1
    return found, unreadable


@dataclass(slots=True)
class Tended:
    """What became of some hit keys, in numbers.

    `prolonged`; `present` for long enough; `void`: invalidated, or past their end; `absent`; `written`: those of the
    absent that L3 gave back.
    """

    prolonged: int = 0
    present: int = 0
    absent: int = 0
    void: int = 0
    written: int = 0

    def __add__(self, other: Tended) -> Tended:
        return Tended(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Promoter:
    """Prolongs and rehydrates the entries of one partition."""

    def __init__(self, link: Link, partition_keys: PartitionKeys, profiles: Mapping[str, Profile]) -> None:
        self._link = link
        self._keys = partition_keys
        self._probations = {f"profile:{name}": int(p.probation * 1000) for name, p in profiles.items()}
        self._default = self._probations[f"profile:{DEFAULT_PROFILE}"]
        self._lines = "\n".join(f"{label} {ms}" for label, ms in self._probations.items())

    async def tend(self, hits: Mapping[str, Hits], l3: Finder | None, *, pressure: bool = False) -> Tended:
        """Let the entries of these keys live longer; write back from `l3` those that L2 no longer holds.

        `pressure`: Redis is short of memory; lives are a tenth as long, and nothing is written back.
        """
        commands = [
            self._promote(part, _UNDER_PRESSURE if pressure else 1.0) for part in _parts(hits.items(), _AT_ONCE)
        ]
        now, *replies = await self._link.send([("TIME",), *commands])
        states = [state for _, *states in replies for state in states]
        tended = Tended(states.count(2), states.count(1), states.count(0), states.count(-1))
        if tended.absent and l3 is not None and not pressure:
            absent = [key for key, state in zip(hits, states, strict=True) if state == 0]
            # The oldest fence of them: older than the question that follows.
            fence = replies[0][0]
            absent = sorted(absent, key=lambda key: -hits[key].count)[:_MOST_ABSENT]
            found = await l3.find(absent)
            fault_point("promotion_after_find")
            tended.written = await self._write_back(found, hits, fence, server_ms(now))
        return tended

    def _promote(self, part: list[tuple[str, Hits]], factor: float) -> Command:
        names = [self._keys.tags, *(self._keys.entry(key) for key, _ in part)]
        args: list[Arg] = [self._default, self._lines]
        for key, hit in part:
            args += [key, hit.at_ms, f"{factor * weight(hit.count):.6f}"]
        return SCRIPTS["promote"].call(names, args)

    async def _write_back(self, found: Mapping[str, bytes], hits: Mapping[str, Hits], fence: bytes, now_ms: int) -> int:
        wanted: list[l2.Kept] = []
        for key, text in found.items():
            try:
                left = hits[key].at_ms + self._life(unpack(key, text), hits[key]) - now_ms
            except Unreadable:
                continue
            if left > 0:  # else its hit is so long ago that it would have left again
                wanted.append(l2.Kept(key, text, left))
        parts = _parts(wanted, _WRITTEN_AT_ONCE)
        written = await self._link.send([l2.rehydrate(self._keys, fence, part) for part in parts])
        return sum(bool(there) for part in written for there in part)

    def _life(self, entry: Entry, hit: Hits) -> int:
        probations = (self._probations[tag] for tag in entry.tags if tag in self._probations)
        return life_ms(hit.at_ms - entry.created_ms, hit.count, next(probations, self._default))


class PromotionConsumer(Consumer):
    """Reads one partition's reports of hits."""

    group = keys.PROMOTION_GROUP

    def __init__(self, crew: Crew, partition_keys: PartitionKeys, *, l3: Finder | None = None) -> None:
        super().__init__(crew, partition_keys)
        self._l3 = l3
        self._promoter = Promoter(self.link, partition_keys, crew.settings.all_profiles)

    @property
    def streams(self) -> tuple[str, ...]:
        """The partition's touches."""
        return (self.keys.touches,)

    async def turn(self) -> None:
        """Read reports and promote what they name."""
        (read,) = self.checked(await self.read([self.read_command(self.keys.touches, _BATCH, block=self.tick)]))
        if read:
            await self._handle(messages_of(read[0][1]))

    async def handle_reclaimed(self, stream: str, messages: list[Message], since_ms: int) -> None:
        """As new ones: a hit says the same moment however often it is told."""
        await self._handle(messages)

    async def tell_poisoned(self, stream: str, message: Message, since_ms: int) -> None:
        """Nobody waits for a report."""

    def bury_command(self, stream: str, message_id: bytes, reason: str, deliveries: int) -> Command:
        """Return the command that lets go of a report. It stays in the stream, which has another group."""
        log.error("%s: giving up on %s of %s: %s", self.name, message_id.decode(), stream, reason)
        self.counters.add("touches_lost")
        return SCRIPTS["ack"].call([stream], [self.group, self.name, message_id])

    async def _handle(self, messages: list[Message]) -> None:
        fault_point("promotion_after_read")
        hits, unreadable = hits_of(messages)
        self.counters.add("touches_lost", unreadable)
        if hits:
            tended = await self._promoter.tend(hits, self._l3, pressure=self.crew.pressure)
            self.counters.add("promoted", tended.prolonged)
            self.counters.add("rehydrated", tended.written)
        fault_point("promotion_before_ack")
        ids = in_order(message.id for message in messages)
        await self.link.call(SCRIPTS["ack"].call([self.keys.touches], [self.group, self.name, *ids]))


class _Stored:
    """The answers table, without a breaker: a periodic job may wait, and fail."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def find(self, keys: Sequence[str], /) -> dict[str, bytes]:
        rows = await self._pool.fetch(_FIND, [bytes.fromhex(key) for key in keys])
        return {row[0].hex(): row[1] for row in rows}


async def sweep(link: Link, pool: Pool, settings: Settings, partitions: int, *, most: int = 1000) -> dict[str, int]:
    """Do for the `most` often hit keys of the last day what a lost report, or an outage, left undone.

    Bounded and idempotent: what lives long enough in L2 is left alone, what is missing and still wanted comes back.
    Returns how many keys were `top`, and the counts of `Tended`.
    """
    rows = await pool.fetch(_TOP, timedelta(days=1), most)
    (now,) = await link.send([("TIME",)])
    hits: dict[int, dict[str, Hits]] = {}
    for key, last_ms in ((row[0].hex(), int(row[1].timestamp() * 1000)) for row in rows):
        at_ms = min(last_ms + _HOUR_MS, server_ms(now))  # the hour is all that is known
        hits.setdefault(partition_of(key, partitions), {})[key] = Hits(1, at_ms)
    pressure = bool(await link.call(("EXISTS", keys.PRESSURE)))
    total = Tended()
    for partition, those in hits.items():
        promoter = Promoter(link, PartitionKeys(partition), settings.all_profiles)
        for part in _parts(those.items(), _MOST_ABSENT):
            total += await promoter.tend(dict(part), _Stored(pool), pressure=pressure)
    return {"top": len(rows), **asdict(total)}


async def run(settings: Settings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Run a promotion worker over every partition until `stop` is set."""
    l3 = OneL3(settings, timeout=_PATIENCE)
    try:
        await run_crew(
            "promotion", settings, stop, on_ready, lambda crew, k: PromotionConsumer(crew, k, l3=l3.of(crew))
        )
    finally:
        await l3.close()


def _parts(items: Iterable[Any], size: int) -> list[list[Any]]:
    whole = list(items)
    return [whole[at : at + size] for at in range(0, len(whole), size)]
