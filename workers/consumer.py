"""The loop every worker shares: one partition's streams, one consumer group, one consumer per process life.

It reads, reclaims what others left behind, recovers what a cut connection left in the air, dead-letters what
nobody survives, and hands back what it has not finished when it is told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from shared.keys import PartitionKeys
from shared.link import LINK_ERRORS, Command, Link
from shared.scripts import SCRIPTS
from workers.crew import Crew

log = logging.getLogger("millpond.worker")

_RECLAIM_COUNT = 64
_DISMISS_AFTER = 60.0
_BACKOFF = (0.05, 2.0)
#: Seconds after which a message that may kill its worker has shown that it does not, at least not at once.
_SURVIVED = 2.0
#: The consumer that never reads: what it holds waits for whoever looks next.
_NOBODY = "nobody"


@dataclass(slots=True)
class Message:
    """One stream entry, delivered to this consumer. `deliveries` counts this one too."""

    id: bytes
    fields: dict[bytes, bytes]
    deliveries: int = 1


class _Once:
    """A callback that does something the first time only."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then: Callable[[], None] | None = then

    def __call__(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()


class StateLost(Exception):
    """A stream or its group vanished: the server was flushed, or failed over to an empty replica."""


def messages_of(raw: Iterable[Any]) -> list[Message]:
    """Return the messages of a reply to XREADGROUP (one stream's part) or XRANGE; trimmed ones are left out."""
    return [Message(e[0], dict(zip(e[1][::2], e[1][1::2], strict=True))) for e in raw if e[1]]


def order_of(message_id: bytes) -> tuple[int, int]:
    """Return a message's id as a pair that compares."""
    ms, _, seq = message_id.partition(b"-")
    return int(ms), int(seq)


def in_order(ids: Iterable[bytes]) -> list[bytes]:
    """Return ids in ascending order, as `ack`, `hold` and `retire` take them."""
    return sorted(ids, key=order_of)


def server_ms(reply: Any) -> int:
    """Return the milliseconds of a reply to TIME."""
    return int(reply[0]) * 1000 + int(reply[1]) // 1000


class Consumer(ABC):
    """One partition's reader. Subclasses say what they read and what they do with it."""

    group: str

    def __init__(self, crew: Crew, keys: PartitionKeys) -> None:
        self.crew = crew
        self.keys = keys
        self.settings = crew.settings
        self.name = crew.name
        self.counters = crew.counters
        self.link = Link(crew.url, name=f"millpond-{self.group}")
        #: only for reads that block: nothing else may wait behind them
        self.reading = Link(crew.url, name=f"millpond-{self.group}-read")
        self.ready = asyncio.Event()
        self.stopping = False
        self._blocked = False
        self._reading_id = 0
        self._cursors: dict[str, bytes] = {}
        self._next_reclaim: dict[str, float] = {}
        self._next_dismissal = 0.0
        self._cut = False
        self._heart: asyncio.Task[None] | None = None

    # what a subclass is

    @property
    def lease(self) -> float:
        """Seconds of silence after which another consumer may take this one's messages."""
        return self.settings.background_lease

    @property
    @abstractmethod
    def streams(self) -> tuple[str, ...]:
        """The streams read, most urgent first."""

    @abstractmethod
    async def turn(self) -> None:
        """Read once, blocking no longer than `tick`, and handle what came."""

    @abstractmethod
    async def handle_reclaimed(self, stream: str, messages: list[Message], since_ms: int) -> None:
        """Handle messages taken over from another consumer, or recovered after a cut connection.

        `since_ms` is when this consumer's lease on them began, by the server's clock.
        """

    @abstractmethod
    async def tell_poisoned(self, stream: str, message: Message, since_ms: int) -> None:
        """Give a message's requesters their error before it is buried; `since_ms` as above."""

    def in_hand(self, stream: str, message_id: bytes) -> bool:
        """Whether this process is handling that message right now."""
        return False

    def when_handled(self, stream: str, message_id: bytes, then: Callable[[], None]) -> None:
        """Call `then` once that reclaimed message is done with; it is already, unless a subclass says otherwise."""
        then()

    def room(self) -> int:
        """How many reclaimed messages may be taken now."""
        return _RECLAIM_COUNT

    def room_for(self, stream: str) -> int:
        """How many of them from that stream."""
        return self.room()

    async def prepare(self) -> None:
        """Create what must exist before the first read; runs again after every loss of connection or state."""
        for stream in self.streams:
            await self.ensure_group(stream)
        if self._heart is None:
            self._heart = asyncio.create_task(self.renew_leases())

    async def renew_leases(self) -> None:
        """Renew the leases of what is in hand, from the first `prepare` until everything was handed back."""

    def state_lost(self) -> None:
        """Forget what was only true of the state that vanished."""

    async def drain(self) -> None:
        """Finish what can be finished before the rest is handed back."""

    # the loop

    @property
    def tick(self) -> float:
        """Seconds between looks at what others left behind, and the longest blocking read."""
        return min(1.0, self.lease / 4)

    async def run(self) -> None:
        """Work until `stop()`; survive every loss of connection and state on the way."""
        pause = _BACKOFF[0]
        while not self.stopping:
            try:
                await self.prepare()
                self._reading_id = await self.reading.call(("CLIENT", "ID"))
                if self._cut:
                    await self._recover_own()
                    self._cut = False
                self.ready.set()
                while not self.stopping:
                    await self.turn()
                    pause = _BACKOFF[0]
                    await self.reclaim_when_due()
            except StateLost:
                log.warning("%s: partition %d lost its state; starting afresh", self.name, self.keys.partition)
                self.state_lost()
            except LINK_ERRORS as error:
                self._cut = True
                log.warning("%s: connection lost (%s); trying again", self.name, error)
            except Exception:
                # Its messages stay pending: reclaimed after the lease, counted, and at last buried.
                log.exception("%s: a turn failed", self.name)
            else:
                break
            if not self.stopping:
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(pause * 2, _BACKOFF[1])
        await self._leave()

    async def stop(self) -> None:
        """End the loop: a blocking read returns early; what it brought, and a batch in hand, is finished."""
        self.stopping = True
        # Never by closing the connection: the server may run the read after all, once everything was handed back.
        with contextlib.suppress(TimeoutError, *LINK_ERRORS):
            async with asyncio.timeout(self.tick + 1):
                while self._blocked:
                    await self.link.post([("CLIENT", "UNBLOCK", self._reading_id)])
                    await asyncio.sleep(0.02)
        if self._blocked:
            await self.reading.close()

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(self.settings.drain_timeout + 5):
                await self.drain()
                lease_ms = int(self.lease * 1000)
                for stream in self.streams:
                    await self.link.send(
                        [
                            SCRIPTS["hand_back"].call([stream], [self.group, self.name, _NOBODY, lease_ms]),
                            SCRIPTS["dismiss"].call([stream], [self.group, self.name]),
                        ]
                    )
        except (*LINK_ERRORS, ResponseError, StateLost) as error:
            log.warning("%s: could not hand back (%r); the lease will", self.name, error)
        if self._heart is not None:
            self._heart.cancel()
        await self.reading.close()
        await self.link.close()

    # reading

    def read_command(self, stream: str, count: int, *, block: float | None) -> Command:
        """Return the XREADGROUP for new messages; `block` in seconds, None not at all."""
        wait = () if block is None else ("BLOCK", max(1, int(block * 1000)))
        return ("XREADGROUP", "GROUP", self.group, self.name, "COUNT", count, *wait, "STREAMS", stream, ">")

    async def read(self, commands: list[Command]) -> list[Any]:
        """Run a pipeline that blocks, on the connection kept for it; the replies, not yet `checked`."""
        self._blocked = True
        try:
            return await self.reading.post(commands)
        finally:
            self._blocked = False

    @staticmethod
    def checked(replies: list[Any]) -> list[Any]:
        """Return the replies of a posted pipeline; raise `StateLost` or the first error among them."""
        for reply in replies:
            if isinstance(reply, ResponseError):
                if str(reply).startswith(("NOGROUP", "UNBLOCKED")):
                    raise StateLost
                raise reply
        return replies

    async def ensure_group(self, stream: str) -> None:
        """Create the group at 0, so that nothing published before it is lost."""
        (reply,) = await self.link.post([("XGROUP", "CREATE", stream, self.group, "0", "MKSTREAM")])
        if isinstance(reply, ResponseError) and not str(reply).startswith("BUSYGROUP"):
            raise reply

    # what others left behind

    def reclaim_is_due(self, stream: str) -> bool:
        """Whether what others left behind of that stream is to be looked at, once there is room for it."""
        return time.monotonic() >= self._next_reclaim.get(stream, 0.0)

    async def reclaim_when_due(self) -> None:
        """Take over what others left behind, if it is time and there is room; again at once while some is found."""
        for stream in self.streams:
            if self.reclaim_is_due(stream) and (room := self.room_for(stream)) > 0:
                self._next_reclaim[stream] = time.monotonic() + self.tick
                if await self._reclaim(stream, min(room, _RECLAIM_COUNT)):
                    del self._next_reclaim[stream]
        if (now := time.monotonic()) >= self._next_dismissal:
            self._next_dismissal = now + _DISMISS_AFTER / 2
            for stream in self.streams:
                await self._dismiss_dead(stream)

    async def _reclaim(self, stream: str, count: int) -> bool:
        """Say whether any was taken up."""
        # JUSTID: being moved is not being delivered. The cursor is kept: a scan that restarts at 0-0 may never get
        # past the leased entries at the head.
        cursor = self._cursors.get(stream, b"0-0")
        lease_ms = int(self.lease * 1000)
        claim = ("XAUTOCLAIM", stream, self.group, self.name, lease_ms, cursor, "COUNT", count, "JUSTID")
        now, reply = self.checked(await self.link.post([("TIME",), claim]))
        self._cursors[stream] = reply[0]
        ids = [i for i in reply[1] if not self.in_hand(stream, i)]
        if ids:
            log.info("%s: took over %d messages of %s", self.name, len(ids), stream)
            return await self._take_over(stream, ids, server_ms(now))
        return False

    async def _take_over(self, stream: str, ids: list[bytes], since_ms: int) -> bool:
        pending = self.checked(
            await self.link.post([("XPENDING", stream, self.group, i, i, 1, self.name) for i in ids])
        )
        fresh: list[bytes] = []
        suspects: list[bytes] = []
        for (entry,) in (p for p in pending if p):
            message_id, _, _, deliveries = entry
            if deliveries >= self.settings.max_deliveries:
                await self._bury(stream, message_id, deliveries, since_ms)
            elif deliveries > 1:
                suspects.append(message_id)
            else:
                fresh.append(message_id)
        if fresh:
            await self._redeliver(stream, fresh, counted=True)
        while suspects and not self.crew.quarantine.locked():
            await self._deliver_alone(stream, suspects.pop(0))
        if suspects:
            lease_ms = int(self.lease * 1000)
            await self.link.call(
                SCRIPTS["put_back"].call([stream], [self.group, self.name, _NOBODY, lease_ms, *suspects])
            )
        return len(suspects) < len(ids)

    async def _deliver_alone(self, stream: str, message_id: bytes) -> None:
        # It may be what killed its workers: alone among its like, it cannot drive others towards their burial.
        # What has survived for a while is not what kills at once: it no longer holds up the others.
        await self.crew.quarantine.acquire()
        release = _Once(self.crew.quarantine.release)
        asyncio.get_running_loop().call_later(_SURVIVED, release)
        try:
            await self._redeliver(stream, [message_id], counted=True)
        finally:
            self.when_handled(stream, message_id, release)

    async def _redeliver(self, stream: str, ids: list[bytes], *, counted: bool) -> None:
        # Counted before anything of a message is parsed.
        command = SCRIPTS["redeliver"].call([stream], [self.group, self.name, int(counted), *ids])
        since_ms, raw = await self.link.call(command)
        messages = [Message(e[0], dict(zip(e[1][::2], e[1][1::2], strict=True)), e[2]) for e in raw]
        if not messages:
            return
        try:
            await self.handle_reclaimed(stream, messages, since_ms)
        except (*LINK_ERRORS, StateLost):
            raise
        except Exception:
            # One that cannot be handled must not keep the others from being: it is counted, and at last buried.
            log.exception("%s: %d reclaimed messages of %s could not be handled", self.name, len(messages), stream)

    async def _bury(self, stream: str, message_id: bytes, deliveries: int, since_ms: int) -> None:
        found = await self.link.call(("XRANGE", stream, message_id, message_id))
        for message in messages_of(found):
            try:
                await self.tell_poisoned(stream, message, since_ms)
            except (*LINK_ERRORS, StateLost):
                raise
            except Exception:
                log.exception("%s: %s is buried without a word to who asked", self.name, message_id.decode())
        await self.bury(stream, message_id, f"delivered {deliveries} times without an outcome", deliveries)

    async def bury(self, stream: str, message_id: bytes, reason: str, deliveries: int) -> None:
        """Move a message to the dead letters."""
        await self.link.call(self.bury_command(stream, message_id, reason, deliveries))

    def bury_command(self, stream: str, message_id: bytes, reason: str, deliveries: int) -> Command:
        """Return the command that moves a message to the dead letters, counted and logged."""
        log.error("%s: burying %s of %s: %s", self.name, message_id.decode(), stream, reason)
        self.counters.add("dead")
        return SCRIPTS["bury"].call(
            [stream, self.keys.dead],
            [self.group, self.name, message_id, reason, deliveries, self.settings.dead_limit],
        )

    async def _recover_own(self) -> None:
        """Take up again what was delivered to this consumer on a connection that was cut."""
        for stream in self.streams:
            (pending,) = self.checked(
                await self.link.post([("XPENDING", stream, self.group, "-", "+", 10_000, self.name)])
            )
            ids = [entry[0] for entry in pending if not self.in_hand(stream, entry[0])]
            for at in range(0, len(ids), _RECLAIM_COUNT):
                # A cut connection is no failed delivery.
                await self._redeliver(stream, ids[at : at + _RECLAIM_COUNT], counted=False)

    async def _dismiss_dead(self, stream: str) -> None:
        (consumers,) = self.checked(await self.link.post([("XINFO", "CONSUMERS", stream, self.group)]))
        gone = []
        for flat in consumers:
            about = dict(zip(flat[::2], flat[1::2], strict=True))
            idle = max(_DISMISS_AFTER, 10 * self.lease) * 1000
            if about[b"pending"] == 0 and about[b"idle"] > idle and about[b"name"] != self.name.encode():
                gone.append(about[b"name"])
        if gone:
            await self.link.send([SCRIPTS["dismiss"].call([stream], [self.group, name]) for name in gone])
