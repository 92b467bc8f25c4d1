"""The persistence worker: what landed and what was touched, from Redis into PostgreSQL.

A batch is one transaction, and is acknowledged only after its commit; each statement bears being repeated. So a crash
anywhere costs a repetition and never an answer, and no hit is counted twice. While PostgreSQL is away the worker keeps
what it holds, renews its lease on it, reads nothing more, and tries again: the streams wait in Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from shared import keys
from shared.database import resolve_database_url
from shared.envelope import Unreadable
from shared.errors import ConfigError
from shared.faults import fault_point
from shared.keys import PartitionKeys
from shared.scripts import SCRIPTS
from shared.settings import Settings
from workers.consumer import Consumer, Message, in_order, messages_of
from workers.crew import Crew
from workers.database import ROW_ERRORS, Away, Database
from workers.records import Landed, Touched, read_landed, read_touches
from workers.runtime import run_crew
from workers.upserts import write_landed, write_touches

log = logging.getLogger("millpond.worker")

_BATCH = 500
#: Entries may be large: a batch is read in fewer messages when the last one weighed more than this (bytes).
_BATCH_BYTES = 16 << 20
#: Seconds to wait after a small batch: a commit costs PostgreSQL about as much for one answer as for many.
_LINGER = 0.05
_PAUSE = (0.1, 5.0)
_CONNECTIONS = 4

Held = list[tuple[Message, Landed | Touched]]


class PersistenceConsumer(Consumer):
    """Writes what landed in one partition, and what was touched there."""

    group = keys.PERSISTENCE_GROUP

    def __init__(self, crew: Crew, partition_keys: PartitionKeys, *, database: Database) -> None:
        super().__init__(crew, partition_keys)
        self.database = database
        self._asked_to_stop = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._held: dict[str, list[bytes]] = {}
        self._count = _BATCH
        self._pause = _PAUSE[0]

    @property
    def streams(self) -> tuple[str, ...]:
        """What landed, then what was touched; that their groups exist makes everyone else write to them."""
        return (self.keys.landed, self.keys.touches)

    def room(self) -> int:
        """None while PostgreSQL is away: a delivery counts, and it is not the message's fault."""
        return 0 if self.database.away else super().room()

    async def stop(self) -> None:
        """As any consumer; a transaction under way has `drain_timeout` seconds left."""
        self._asked_to_stop.set()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self.settings.drain_timeout)
        await super().stop()

    async def turn(self) -> None:
        """Read a batch of each stream and write it; while PostgreSQL is away, look for it instead."""
        if self.database.away:
            await self._look()
            return
        names = (*self.streams, *(">" for _ in self.streams))
        block = ("BLOCK", max(1, int(self.tick * 1000)))
        command = ("XREADGROUP", "GROUP", self.group, self.name, "COUNT", self._count, *block, "STREAMS", *names)
        (read,) = self.checked(await self.read([command]))
        batches = {stream.decode(): messages_of(raw) for stream, raw in read or ()}
        if batches:
            fault_point("persistence_after_read")
            await self._take(batches)
            if sum(map(len, batches.values())) < _BATCH // 10:
                await self._rest(_LINGER)

    async def handle_reclaimed(self, stream: str, messages: list[Message], since_ms: int) -> None:
        """Write them (again, perhaps)."""
        await self._take({stream: messages})

    async def tell_poisoned(self, stream: str, message: Message, since_ms: int) -> None:
        """Nobody waits for it."""

    # a batch

    async def _take(self, batches: dict[str, list[Message]]) -> None:
        self._held = {stream: [message.id for message in messages] for stream, messages in batches.items()}
        self._count = min(map(_count_of, batches.values()))
        try:
            for stream, messages in batches.items():
                await self._store(stream, await self._readable(stream, messages))
                self._held.pop(stream)
        finally:
            self._held = {}

    async def _readable(self, stream: str, messages: list[Message]) -> Held:
        """Return what can be read; bury the rest."""
        readable: Held = []
        burials = []
        for message in messages:
            try:
                readable.append((message, self._read(stream, message)))
            except Unreadable as error:
                reason = f"unreadable: {error}"
                burials.append(self.bury_command(stream, message.id, reason, message.deliveries))
        if burials:
            await self.link.send(burials)
        return readable

    def _read(self, stream: str, message: Message) -> Landed | Touched:
        if stream == self.keys.landed:
            return read_landed(self.keys.partition, message.id, message.fields)
        return read_touches(message.id, message.fields)

    async def _store(self, stream: str, held: Held) -> None:
        """Write and acknowledge; a batch that is refused for one of its rows is halved until that row is alone."""
        if not held:
            return
        try:
            if not await self._write(stream, [record for _, record in held]):
                return
        except ROW_ERRORS as error:
            if len(held) == 1:
                message = held[0][0]
                await self.bury(stream, message.id, f"PostgreSQL refuses it: {error}", message.deliveries)
                return
            half = len(held) // 2
            await self._store(stream, held[:half])
            await self._store(stream, held[half:])
            return
        fault_point("persistence_after_commit")
        await self._acknowledge(stream, [message.id for message, _ in held])
        fault_point("persistence_after_ack")

    async def _write(self, stream: str, records: Sequence[Any]) -> bool:
        """Commit, however long PostgreSQL is away; False when told to stop before."""
        landed = stream == self.keys.landed
        work = (
            partial(write_landed, partition=self.keys.partition, landed=records)
            if landed
            else partial(write_touches, stream=stream, touched=records)
        )
        while True:
            try:
                written = await self._limited(work)
            except (Away, TimeoutError):
                if self.stopping:
                    return False
                await self._back_off()
                continue
            self._pause = _PAUSE[0]
            self.counters.add("persisted" if landed else "touches_counted", written)
            return True

    async def _limited(self, work: Callable[[Any], Awaitable[int]]) -> int:
        try:
            async with asyncio.timeout(self.settings.drain_timeout if self.stopping else None) as self._limit:
                return await self.database.run(work)
        finally:
            self._limit = None

    async def _acknowledge(self, stream: str, ids: list[bytes]) -> None:
        script = SCRIPTS["retire"] if stream == self.keys.landed else SCRIPTS["ack"]
        done = await self.link.call(script.call([stream], [self.group, self.name, *in_order(ids)]))
        if done < len(ids):
            self.counters.add("leases_lost", len(ids) - done)
            log.warning("%s: %d of %d belong to another worker; not acknowledged", self.name, len(ids) - done, len(ids))

    # waiting for PostgreSQL

    async def _look(self) -> None:
        try:
            await self.database.look()
            self._pause = _PAUSE[0]
        except Away:
            await self._back_off()

    async def _back_off(self) -> None:
        await self._rest(self._pause * random.uniform(0.5, 1.5))
        self._pause = min(self._pause * 2, _PAUSE[1])

    async def _rest(self, seconds: float) -> None:
        """Sleep, but not through being told to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked_to_stop.wait()

    async def renew_leases(self) -> None:
        """Several times per lease, while PostgreSQL is away too."""
        while True:
            await asyncio.sleep(self.lease / 5)
            commands = [
                SCRIPTS["hold"].call([stream], [self.group, self.name, *in_order(ids)])
                for stream, ids in self._held.items()
                if ids
            ]
            try:
                await self.link.send(commands)
            except Exception as error:
                log.warning("%s: leases not renewed (%r)", self.name, error)


def _count_of(messages: Sequence[Message]) -> int:
    """Return how many messages of this weight to read at once."""
    weight = sum(len(value) for message in messages for value in message.fields.values())
    return max(1, min(_BATCH, _BATCH_BYTES * len(messages) // max(1, weight)))


async def run(settings: Settings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Run a persistence worker over every partition until `stop` is set.

    Raises:
        ConfigError: there is no database.
    """
    if resolve_database_url(settings) is None:
        raise ConfigError(
            "a persistence worker needs PostgreSQL: set MILLPOND_DATABASE_URL, or start the embedded one with "
            "`millpond up`" + ("" if settings.l3 else "; MILLPOND_L3 must not be false"),
            field="database_url",
        )
    database = Database(settings, size=_CONNECTIONS)

    def consumer(crew: Crew, partition_keys: PartitionKeys) -> PersistenceConsumer:
        return PersistenceConsumer(crew, partition_keys, database=database)

    try:
        await run_crew("persistence", settings, stop, on_ready, consumer)
    finally:
        await database.close()
