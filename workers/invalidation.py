"""The invalidation worker: deletes physically what has been invalidated, counts it, and prunes old markers.

An invalidation is in force once the log holds it; nothing here is needed for that. This worker frees the memory, tells
whoever waits how much it was (`swept:ID`), and keeps the audit. One scan of L2 serves all that came meanwhile. While
PostgreSQL is away L2 is swept, and the entries stay pending until L3 is too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from asyncpg import Pool

from shared import keys
from shared.database import DATABASE_ERRORS, LatePool
from shared.faults import fault_point
from shared.keys import PartitionKeys
from shared.link import LINK_ERRORS, Command
from shared.scripts import SCRIPTS
from shared.settings import Settings
from workers import audit
from workers.audit import Owed
from workers.consumer import Consumer, Message, in_order, messages_of, order_of
from workers.crew import Crew
from workers.prune import caught_up, persisted, prune
from workers.runtime import run_crew
from workers.sweep import Answer, LogEntry, Tally, epoch_of, find_l2, markers, sweep_l2, sweep_l3

log = logging.getLogger("millpond.worker")

_BATCH = 1000
_SWEPT_MS = 3_600_000
_BACKOFF = (0.2, 10.0)
#: More markers than this are pruned although they are young.
_MANY_MARKERS = 50_000
_YOUNG = 60.0
#: Seconds to wait for persistence before this worker turns to the log again, and tries anew later.
_PATIENCE = 1.0


class InvalidationConsumer(Consumer):
    """Sweeps one partition."""

    group = keys.INVALIDATION_GROUP

    def __init__(self, crew: Crew, partition_keys: PartitionKeys, database: LatePool) -> None:
        super().__init__(crew, partition_keys)
        self._database = database
        self._owed: dict[bytes, Owed] = {}
        #: Entries may have left the log unseen, or with a worker that died: all that any marker voids is to be swept.
        self._all_of_l2 = self._all_of_l3 = True
        #: whatever left the log before this entry did so before all was swept
        self._swept_from = b"0-0"
        #: deleted from each tier for what the log said after it was last read
        self._ahead_l2: list[Answer] = []
        self._ahead_l3: list[Answer] = []
        self._pause = 0.0
        self._again_at = 0.0
        self._halt = asyncio.Event()
        self._prune_at = self._next_pruning()

    @property
    def streams(self) -> tuple[str, ...]:
        """The partition's log."""
        return (self.keys.invalidations,)

    def in_hand(self, stream: str, message_id: bytes) -> bool:
        """Waiting for L3."""
        return message_id in self._owed

    def room(self) -> int:
        """As many as are owed at most."""
        return max(0, _BATCH - len(self._owed))

    def state_lost(self) -> None:
        """What was owed concerned entries that vanished, and markers that L3 outlived: only L3 is left to look at."""
        self._owed.clear()
        self._all_of_l2 = self._all_of_l3 = True

    async def stop(self) -> None:
        """A sweep under way is given up, and its entries handed back."""
        self._halt.set()
        await super().stop()

    async def tell_poisoned(self, stream: str, message: Message, since_ms: int) -> None:
        """Nobody waits for more than a count."""

    def bury_command(self, stream: str, message_id: bytes, reason: str, deliveries: int) -> Command:
        """Return the command that lets go of an entry. It stays: whoever holds an L1 follows this log."""
        log.error("%s: giving up sweeping for %s: %s", self.name, message_id.decode(), reason)
        self.counters.add("dead")
        return SCRIPTS["ack"].call([stream], [self.group, self.name, message_id])

    async def prepare(self) -> None:
        """Create the group; sweep for all that may have gone unseen."""
        await super().prepare()
        first = await self.link.call(("XRANGE", self.keys.invalidations, "-", "+", "COUNT", 1))
        self._swept_from = first[0][0] if first else b"0-0"
        await self._catch_up()

    # one turn

    async def turn(self) -> None:
        """Read what the log has, sweep for all of it at once, prune when it is time."""
        await self._catch_up()
        await self._hold()
        if not self.stopping and self.room():
            await self._read()
        elif not self.stopping:
            await asyncio.sleep(self.tick)
        if self._owed and (self._due() or not all(owed.swept_l2 for owed in self._owed.values())):
            await self._unless_stopped(self._sweep())
        if time.monotonic() >= self._prune_at:
            await self._unless_stopped(self._prune())

    async def _read(self) -> None:
        k = self.keys
        results = await self.read(
            [
                ("XINFO", "GROUPS", k.invalidations),
                self.read_command(k.invalidations, self.room(), block=self._patience()),
                ("XRANGE", k.invalidations, "-", "+", "COUNT", 1),
            ]
        )
        read, first, groups = self.checked([*results[1:], results[0]])
        seen = next(_last_delivered(group) for group in groups if self.group.encode() in group)
        # Trimmed from its head, the log may have lost entries between what was read, or swept for, and its first one.
        if first and order_of(first[0][0]) > max(order_of(seen), order_of(self._swept_from)):
            self._all_of_l2 = self._all_of_l3 = True
            self._swept_from = first[0][0]
        if read:
            await self._take(messages_of(read[0][1]))

    async def handle_reclaimed(self, stream: str, messages: list[Message], since_ms: int) -> None:
        """As new ones, with the next sweep."""
        await self._take(messages)

    async def _take(self, messages: list[Message]) -> None:
        done = []
        for message in messages:
            entry = LogEntry.read(message.id, message.fields)
            if entry.idle:
                done.append(message.id)
            else:
                self._owed[message.id] = Owed(entry)
        if len(done) < len(messages):
            fault_point("invalidation_after_read")
        if done:
            await self.link.call(SCRIPTS["ack"].call(list(self.streams), [self.group, self.name, *in_order(done)]))

    def _due(self) -> bool:
        return time.monotonic() >= self._again_at

    def _patience(self) -> float:
        return min(self.tick, max(0.01, self._again_at - time.monotonic())) if self._owed else self.tick

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it, renewing the leases of all that is in hand; give it up when this worker is to stop."""
        doing = asyncio.create_task(work)
        halt = asyncio.create_task(self._halt.wait())
        try:
            async with self._holding():
                await asyncio.wait((doing, halt), return_when=asyncio.FIRST_COMPLETED)
        finally:
            halt.cancel()
            doing.cancel()
            await asyncio.gather(doing, halt, return_exceptions=True)
        if not doing.cancelled():
            doing.result()

    async def _hold(self) -> None:
        if ids := in_order(self._owed):
            await self.link.call(SCRIPTS["hold"].call(list(self.streams), [self.group, self.name, *ids]))

    @asynccontextmanager
    async def _holding(self) -> AsyncIterator[None]:
        async def hold() -> None:
            while True:
                await asyncio.sleep(self.tick)
                with contextlib.suppress(*LINK_ERRORS):
                    await self._hold()

        holding = asyncio.create_task(hold())
        try:
            yield
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    # sweeping

    async def _sweep(self) -> None:
        fresh = [owed for owed in self._owed.values() if not owed.swept_l2]
        if fresh:
            await self._sweep_l2(fresh)
        fault_point("invalidation_after_l2")
        try:
            pool = await self._pool()
            if pool is not None:
                # What landed before and is written only now would outlive the sweep.
                written = await self._all_written()
                await self._sweep_l3(pool)
                fault_point("invalidation_after_l3")
                if not written:
                    raise ConnectionError("persistence is behind")
        except DATABASE_ERRORS as error:
            await self._postpone(error)
        else:
            await self._tell(pool)
            self._pause = 0.0

    async def _sweep_l2(self, fresh: Sequence[Owed]) -> None:
        entries = [owed.entry for owed in fresh]
        orders, inquiries = ([e for e in entries if e.inquiry == wanted] for wanted in (False, True))
        tally, found = Tally(orders, self._ahead_l2), Tally(inquiries)
        if inquiries:  # first: what is invalid already does not count
            await find_l2(self.link, self.keys, found, {label for e in inquiries for label in e.labels})
        if orders:
            await sweep_l2(self.link, self.keys, tally, log=orders)
            self._ahead_l2 = tally.others
        for owed in fresh:
            owed.l2 += (found if owed.entry.inquiry else tally).counts[owed.entry.id]
            owed.swept_l2 = True

    async def _all_written(self) -> bool:
        newest = max((order_of(i)[0] for i, owed in self._owed.items() if not owed.entry.inquiry), default=0)
        return not newest or await caught_up(self.link, self.keys, newest, _PATIENCE)

    async def _sweep_l3(self, pool: Pool) -> None:
        for inquiry in (True, False):
            owing = [owed for owed in self._owed.values() if owed.entry.inquiry == inquiry]
            tally = Tally([owed.entry for owed in owing], () if inquiry else self._ahead_l3)
            self._ahead_l3 = self._ahead_l3 if inquiry else []
            marks = [(label, epoch_of(owed.entry.id)) for owed in owing for label in owed.entry.labels]
            try:
                await sweep_l3(pool, self.keys.partition, marks, tally, delete=not inquiry)
            finally:  # what was deleted before it failed was deleted
                for owed in owing:
                    counted = tally.counts[owed.entry.id]
                    owed.l3 = counted if inquiry else owed.l3 + counted

    async def _tell(self, pool: Pool | None) -> None:
        """Write the audit, tell who waits, acknowledge: in this order, so that a crash repeats and loses nothing."""
        k, owing = self.keys, list(self._owed.values())
        totals = {} if pool is None else await audit.write(pool, k.partition, owing)
        fault_point("invalidation_after_audit")
        telling: list[tuple[Any, ...]] = []
        for owed in self._owed.values():
            swept, entry = k.swept(owed.entry.id), owed.entry
            if pool is not None:
                l2, l3 = totals[entry.id]
                telling.append(("HSET", swept, "l2", l2, "l3", l3, "done", 1))
            else:
                how = ("HSET", swept, "l2") if entry.inquiry else ("HINCRBY", swept, "l2")
                telling += [(*how, owed.l2), ("HSET", swept, "done", 1)]
            telling.append(("PEXPIRE", swept, _SWEPT_MS))
        ids = in_order(self._owed)
        await self.link.send([*telling, SCRIPTS["ack"].call([k.invalidations], [self.group, self.name, *ids])])
        self.counters.add("swept", sum(owed.deleted for owed in self._owed.values() if not owed.entry.inquiry))
        self._owed.clear()

    async def _catch_up(self) -> None:
        if self._all_of_l2 or (self._all_of_l3 and self._due()):
            await self._unless_stopped(self._sweep_everything())

    async def _sweep_everything(self) -> None:
        if self._all_of_l2:
            tally = Tally(())
            await sweep_l2(self.link, self.keys, tally)
            self._ahead_l2 = tally.others
            self._all_of_l2 = False
        try:
            if (pool := await self._pool()) is not None:
                marks = [(label, epoch_of(at)) for label, at in (await markers(self.link, self.keys)).items()]
                marks += await audit.remembered(pool, self.keys.partition)
                tally = Tally(())
                await sweep_l3(pool, self.keys.partition, marks, tally)
                self._ahead_l3 = tally.others
            self._all_of_l3 = False
        except DATABASE_ERRORS as error:
            await self._postpone(error)

    async def _pool(self) -> Pool | None:
        """Return the pool; None where answers are not persisted.

        Raises:
            ConnectionError: they are, but no server is known now.
        """
        pool = await self._database.get()
        if pool is None and self.settings.l3 and await persisted(self.link, self.keys):
            raise ConnectionError("no PostgreSQL is known, but answers were persisted")
        return pool

    async def _postpone(self, error: BaseException) -> None:
        if not self._pause:
            log.warning("%s: L3 is swept later (%r)", self.name, error)
        self._pause = min(max(2 * self._pause, _BACKOFF[0]), _BACKOFF[1])
        self._again_at = time.monotonic() + self._pause * random.uniform(0.5, 1.5)
        known = [(self.keys.swept(owed.entry.id), owed.l2) for owed in self._owed.values() if not owed.known]
        await self.link.send(
            [part for name, l2 in known for part in (("HSET", name, "l2", l2), ("PEXPIRE", name, _SWEPT_MS))]
        )

    # pruning

    def _next_pruning(self) -> float:
        return time.monotonic() + self.settings.marker_age * random.uniform(0.25, 0.75)

    async def _prune(self) -> None:
        self._prune_at = self._next_pruning()
        many = await self.link.call(("HLEN", self.keys.tags)) > _MANY_MARKERS
        age = min(self.settings.marker_age, _YOUNG) if many else self.settings.marker_age
        try:
            pool = await self._pool()
            done = await prune(self.link, pool, self.keys, older_than=age, patience=_PATIENCE)
        except DATABASE_ERRORS as error:
            log.warning("%s: partition %d is pruned later (%r)", self.name, self.keys.partition, error)
        else:
            self.counters.add("pruned", done.markers)


def _last_delivered(group: list[Any]) -> bytes:
    """Return up to where the group has read, of its part of a reply to XINFO GROUPS."""
    return bytes(dict(zip(group[::2], group[1::2], strict=True))[b"last-delivered-id"])


async def run(settings: Settings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Run an invalidation worker over every partition until `stop` is set."""
    database = LatePool(settings, name="millpond-invalidation")
    try:
        await run_crew(
            "invalidation", settings, stop, on_ready, lambda crew, k: InvalidationConsumer(crew, k, database)
        )
    finally:
        database.close()
