"""The lookup worker: answers what a cache tier holds, puts the rest aboard a flight.

A batch of requests is read in one pipeline with the invalidations, so it is judged against every invalidation that
was acknowledged before any of them was published. Hits are answered first; misses are joined to a flight and
acknowledged in the same step. What L1 and L2 do not hold is looked for in L3 on the side, while the next batch is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from shared import keys
from shared.entry import Entry, unpack
from shared.envelope import Unreadable
from shared.errors import DeadlineExceeded, InvalidRequest, MillpondError, NotCached, Overloaded, Poisoned
from shared.faults import fault_point
from shared.keys import PartitionKeys, partition_of
from shared.link import LINK_ERRORS, Command, Link
from shared.messages import MAX_DEADLINE, Question, Rules, label, understand
from shared.outbox import Outbox, error_payload
from shared.scripts import SCRIPTS
from shared.settings import Settings
from shared.tiers import l2
from shared.tiers.l1 import L1
from shared.tiers.l3 import L3
from shared.touches import Touches
from workers.answered import Answered
from workers.batch import Ask, Batch, fits, read_ask
from workers.consumer import Consumer, Message, messages_of, server_ms
from workers.crew import Crew
from workers.database import OneL3
from workers.dives import Dives
from workers.following import Following
from workers.joining import Joining, lead_payload
from workers.refreshing import Refreshing
from workers.runtime import run_crew

log = logging.getLogger("millpond.worker")

# Smaller than what one client may have waiting: it reads the first replies while the next requests are answered.
_BATCH = 32
_REMEMBERED = 4096
_FIELDS = (b"id", b"reply", b"deadline", b"body", b"cache")
_REMEMBER_UP_TO = 8192
#: Batches that may be looking into L3 at once.
_DIVES = 8
_LONGEST_MS = int(MAX_DEADLINE * 1000)


class LookupConsumer(Consumer):
    """Resolves the requests of one partition."""

    group = keys.LOOKUP_GROUP

    def __init__(self, crew: Crew, partition_keys: PartitionKeys, *, l3: L3 | None = None) -> None:
        super().__init__(crew, partition_keys)
        settings = crew.settings
        self.l3 = l3
        self.l1 = L1(entries=-(-settings.l1_entries // crew.partitions), size=settings.l1_bytes // crew.partitions)
        self._following = Following(partition_keys, self.l1)
        rules = Rules.of(settings)
        #: understanding is a pure function of a request's bytes, and the same questions come again
        self._remembered = lru_cache(_REMEMBERED // crew.partitions)(partial(understand, rules=rules))
        self._rules = rules
        patience = self.tick / 4
        self._answered = Answered(self.keys.requests, self.group, self.name, most=_BATCH, patience=patience)
        self._joining = Joining(self.keys, settings, self.group, self.name)
        self._touches = Touches(self.keys.touches, settings.touches_limit)
        self._refreshing = Refreshing(self._joining, self.link, self.counters, rules.profiles.values())
        #: batches that look into L3
        self._dives = Dives(_DIVES)

    @property
    def lease(self) -> float:
        """As configured for lookup workers."""
        return self.settings.lookup_lease

    @property
    def streams(self) -> tuple[str, ...]:
        """The partition's requests."""
        return (self.keys.requests,)

    def in_hand(self, stream: str, message_id: bytes) -> bool:
        """Being looked for in L3, or answered already and about to be retired."""
        return message_id in self._dives or message_id in self._answered

    async def prepare(self) -> None:
        """Create the group; begin to follow the invalidation log at its end, with nothing in L1."""
        await super().prepare()
        await self._following.begin(self.link)

    def state_lost(self) -> None:
        """What was cached belonged to the state that vanished."""
        self._following.forget()
        self._answered.clear()

    # one turn

    async def turn(self) -> None:
        """Reply to the last batch, read the next and the new invalidations, all in one write; judge it."""
        replies, messages = self._answered.take()
        retiring, count = self._answered.due()
        reading = (
            self.read_command(self.keys.requests, _BATCH, block=self.tick),
            self._following.command(),
            ("TIME",),
        )
        try:
            results = await self.read([*replies, *retiring, *self._touches.report(), *reading])
        except LINK_ERRORS:
            self._answered.put_back(replies, messages)
            raise
        self._answered.confirm(messages, results[: len(replies)])
        read, log, now = self.checked(results[len(replies) :])[-3:]
        self._answered.retired(count)
        self._following.apply(log)
        if read:
            await self._handle(messages_of(read[0][1]), server_ms(now))

    async def drain(self) -> None:
        """Tell and retire what was answered, because no read follows."""
        await self._dives.end()
        await self._post([], self.link)
        retiring, count = self._answered.due(now=True)
        await self.link.send([*retiring, *self._touches.report(now=True)])
        self._answered.retired(count)

    async def handle_reclaimed(self, stream: str, messages: list[Message], since_ms: int) -> None:
        """As new ones, after catching up with the log."""
        fault_point("lookup_after_redeliver")
        (log,) = self.checked(await self.link.post([self._following.command()]))
        self._following.apply(log)
        await self._handle(messages, since_ms)
        await self.drain()

    async def tell_poisoned(self, stream: str, message: Message, since_ms: int) -> None:
        """Reply with `Poisoned`."""
        outbox = Outbox(self.settings.reply_limit)
        error = Poisoned("this request repeatedly ended the workers that handled it; it lies in the dead letters")
        client = message.fields.get(b"reply", b"").decode(errors="replace")
        outbox.add(client, message.fields.get(b"id", b""), error_payload(error))
        await self.link.send(outbox.take(since_ms + int(self.lease * 800)))

    async def _handle(self, messages: list[Message], now_ms: int) -> None:
        # The lease ran from some moment before the server said `now_ms`: a part of it is left as margin.
        batch = Batch(now_ms, now_ms + int(self.lease * 800), Outbox(self.settings.reply_limit))
        fault_point("lookup_after_read")
        self.counters.add("requests", len(messages))
        for message in messages:
            try:
                self._sort(batch, message)
            except Exception:
                # It stays pending, is delivered again, and at last buried; the others of its batch are not held up.
                log.exception("%s: cannot read %s", self.name, message.id.decode())
        fault_point("lookup_before_reply")
        fence = await self._look_in_l2(batch) if batch.missing else b""
        deep = [q for q, _ in batch.missing if q.reads] if self.l3 is not None and self.l3.open else []
        if deep:
            missing, batch.missing = batch.missing, {}
            sunk = Batch(batch.now_ms, batch.not_after_ms, Outbox(self.settings.reply_limit), missing=missing)
            ids = [ask.message_id for asks in missing.values() for ask in asks]
            await self._dives.begin(ids, self._dive(sunk, fence))
        elif batch.missing or batch.chores:
            await self._join(batch, self.reading)
        self._answered.add(*batch.take(self.counters, self._touches))
        self._refreshing.send(batch)
        if batch.moves:
            await self._move(batch)
        if batch.chores:
            await self.link.send(batch.chores)

    async def _send(self, batch: Batch, extra: list[Command], link: Link) -> list[Any]:
        """Send the replies so far and `extra` behind them; return the results of `extra`.

        On the reading connection while a batch is in hand: nothing blocks it. What happens on the side has the other.
        """
        self._answered.add(*batch.take(self.counters, self._touches))
        return await self._post(extra, link)

    async def _post(self, extra: list[Command], link: Link) -> list[Any]:
        replies, messages = self._answered.take()
        try:
            results = await link.post([*replies, *extra])
        except LINK_ERRORS:
            self._answered.put_back(replies, messages)
            raise
        self._answered.confirm(messages, results[: len(replies)])
        return self.checked(results[len(replies) :])

    # reading a message

    def _understand(self, body: bytes, cache: bytes | None) -> Question:
        if len(body) > _REMEMBER_UP_TO:
            return understand(body, cache, self._rules)
        return self._remembered(body, cache)

    def _sort(self, batch: Batch, message: Message) -> None:
        """Answer a request from L1, or put it with the missing."""
        try:
            ask = read_ask(message, self._understand, batch.now_ms + _LONGEST_MS)
        except InvalidRequest as error:
            self._refuse(batch, message, error)
            return
        question = ask.question
        if partition_of(question.key, self.crew.partitions) != self.keys.partition:
            self._hand_over(batch, message, question.key)
        elif ask.deadline_ms <= batch.now_ms:
            self.counters.add("expired")
            batch.answer(
                ask, error_payload(DeadlineExceeded("the deadline had passed before a worker saw the request"))
            )
        else:
            entry = self.l1.get(question.key, batch.now_ms) if question.reads else None
            if entry is not None and (question.any_entry or _watched(entry, question, batch.now_ms)):
                batch.hit(ask, entry, "l1")
                self._refreshing.consider(batch, ask, entry)
            else:
                alone = b"%b %b" % (ask.client.encode(), ask.request_id) if question.mode == "bypass" else b""
                batch.missing.setdefault((question, alone), []).append(ask)

    def _refuse(self, batch: Batch, message: Message, error: InvalidRequest) -> None:
        """Say what is wrong to whoever asked; without a reply channel it is a dead letter."""
        self.counters.add("invalid")
        client, request_id = message.fields.get(b"reply", b""), message.fields.get(b"id", b"")
        try:
            to = label(client.decode(), "reply")
            label(request_id.decode(), "id")
        except (InvalidRequest, UnicodeDecodeError):
            reason = f"{error.field}: {error.message}"
            batch.chores.append(self.bury_command(self.keys.requests, message.id, reason, message.deliveries))
            return
        batch.outbox.add(to, request_id, error_payload(error))
        batch.answered.append(message.id)

    def _hand_over(self, batch: Batch, message: Message, key: str) -> None:
        """Move a request to the partition its key belongs to: epochs mean nothing outside one partition's log."""
        target = PartitionKeys(partition_of(key, self.crew.partitions)).requests
        self.counters.add("handed_over")
        fields = [part for name in _FIELDS if name in message.fields for part in (name, message.fields[name])]
        batch.moves.append(SCRIPTS["forward"].call([target], [batch.not_after_ms, *fields]))
        batch.moved.append(message.id)

    async def _move(self, batch: Batch) -> None:
        results = await self.link.post(batch.moves)
        self._answered.ready([moved for moved, result in zip(batch.moved, results, strict=True) if result == 1])

    # the tiers below

    async def _look_in_l2(self, batch: Batch) -> bytes:
        """Answer from L2 what it holds; L1's replies go out in the same pipeline, ahead of it. Return the fence."""
        asked = [(question, asks) for (question, _), asks in batch.missing.items() if question.reads]
        if not asked:
            return b""
        clock = self.l1.clock
        fetch = l2.fetch(self.keys, [question for question, _ in asked])
        ((fence, *found),) = await self._send(batch, [fetch], self.reading)
        for (question, asks), text in zip(asked, found, strict=True):
            if isinstance(text, int):
                self.counters.add(("absent", "invalidated", "unreadable")[text], len(asks) if not text else 1)
            elif entry := self._open(batch, question.key, text):
                self.l1.put(entry, clock=clock)
                self._found(batch, question, asks, entry, "l2")
        return bytes(fence)

    def _found(self, batch: Batch, question: Question, asks: list[Ask], entry: Entry, tier: str) -> None:
        if fits(entry, question, batch.now_ms):
            self._serve(batch, asks, entry, tier)
            del batch.missing[question, b""]

    async def _dive(self, batch: Batch, fence: bytes) -> None:
        """Answer from L3 what may still be served; put the rest aboard flights."""
        await self._look_in_l3(batch, fence)
        await self._join(batch, self.link)
        self._refreshing.send(batch)
        await self._send(batch, batch.chores, self.link)

    async def _look_in_l3(self, batch: Batch, fence: bytes) -> None:
        asked: dict[str, list[tuple[Question, list[Ask]]]] = {}  # questions of one key may differ in their directives
        for (question, _), asks in batch.missing.items():
            if question.reads:
                asked.setdefault(question.key, []).append((question, asks))
        assert self.l3 is not None  # noqa: S101 (nobody dives without one)
        found = await self.l3.find(list(asked))
        fault_point("lookup_in_l3")
        if not found:
            return
        clock = self.l1.clock
        there = [(*one, text) for key, text in found.items() for one in asked[key]]
        kept = [l2.Kept(q.key, text, q.probation_ms, q.own_tags) for q, _, text in there]
        (judged,) = await self._send(batch, [l2.rehydrate(self.keys, fence, kept)], self.link)
        for (question, asks, text), valid in zip(there, judged, strict=True):
            tier, newest = ("l3", text) if valid == 1 else ("l2", valid)
            if valid and (entry := self._open(batch, question.key, newest)) and entry.expires_ms > batch.now_ms:
                self.l1.put(entry, clock=clock)
                self._found(batch, question, asks, entry, tier)

    def _open(self, batch: Batch, key: str, text: bytes) -> Entry | None:
        try:
            return unpack(key, text)
        except Unreadable:
            self.counters.add("unreadable")
            batch.chores.append(("UNLINK", self.keys.entry(key)))
            return None

    def _serve(self, batch: Batch, asks: list[Ask], entry: Entry, tier: str) -> None:
        for ask in asks:
            batch.hit(ask, entry, tier)
        self._refreshing.consider(batch, asks[0], entry)

    # joining

    async def _join(self, batch: Batch, link: Link) -> None:
        """Put what no tier holds aboard a flight; the script acknowledges it."""
        aboard: list[tuple[Question, list[Ask]]] = []
        for (question, _), asks in batch.missing.items():
            if question.mode == "only-if-cached":
                epoch = self._following.at.decode()
                refusal = error_payload(NotCached("nothing is cached for this request", epoch=epoch))
                self.counters.add("not_cached", len(asks))
                for ask in asks:
                    batch.answer(ask, refusal)
            else:
                aboard.append((question, asks))
        joins = [self._joining.join(question, asks, batch.now_ms) for question, asks in aboard]
        chores, batch.chores = batch.chores, []
        results = await self._send(batch, [*chores, *joins], link)
        fault_point("lookup_after_join")
        for (question, asks), result in zip(aboard, results[len(chores) :], strict=True):
            self._joined(batch, question, asks, result)

    def _joined(self, batch: Batch, question: Question, asks: list[Ask], result: list[Any]) -> None:
        status = result[0]
        if status == b"BEGUN":
            self.counters.add("miss")
            self.counters.add("collapsed", result[2] - 1)
        elif status == b"JOINED":
            self.counters.add("collapsed", result[2])
        elif status == b"LEAD":
            self.counters.add("led")
            self.counters.add("collapsed", result[2] - 1)
            lease, partition = self.settings.compute_lease, self.keys.partition
            batch.outbox.add(*lead_payload(question, result, lease, partition))
        elif status == b"FULL":
            self.counters.add("overloaded", len(asks))
            error: MillpondError = Overloaded("the LLM workers' queue is full; try again later", retry_after=1.0)
            for ask in asks:
                batch.answer(ask, error_payload(error))
        elif status == b"FAILED":
            self.counters.add("failed_lately", len(asks))
            for ask in asks:
                batch.answer(ask, b'{"error":%b}' % result[1])
        elif status in (b"HIT", b"STALE") and (entry := self._open(batch, question.key, result[1])):
            if status == b"HIT":
                self._serve(batch, asks, entry, "l2")
            else:
                self.counters.add("stale_if_error", len(asks))
                for ask in asks:
                    batch.answer(ask, entry.reply("l2", batch.now_ms, degraded=True))
                    waited_ms = max(0, batch.now_ms - int(ask.message_id.split(b"-")[0]))
                    self._touches.add(
                        "stale", question.kind, 1, waited_ms,
                        tokens=entry.tokens, cost=entry.cost, saved_ms=entry.compute_ms,
                    )  # fmt: skip
        # LOST, or an unreadable entry: nothing was acknowledged; whoever owns the messages joins them again.


def _watched(entry: Entry, question: Question, now_ms: int) -> bool:
    """Whether an entry in memory fits a request of certain wishes.

    Labels the entry does not carry were not watched for it: for those the server's markers must be asked.
    """
    return set(question.own_tags) <= set(entry.tags) and fits(entry, question, now_ms)


async def run(settings: Settings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Run a lookup worker over every partition until `stop` is set."""
    l3 = OneL3(settings, timeout=settings.l3_timeout)
    try:
        await run_crew("lookup", settings, stop, on_ready, lambda crew, k: LookupConsumer(crew, k, l3=l3.of(crew)))
    finally:
        await l3.close()
