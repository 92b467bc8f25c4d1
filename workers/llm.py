"""The LLM worker: computes flights, lands them, tells everyone aboard.

It takes as many fills as it has free slots, refreshes in the slots that they leave (half of all at most), and renews
what it computes five times per lease. Whatever it writes is fenced by ownership; when it loses a lease it cancels the
call and writes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from shared import keys
from shared.embedded import resolve_url
from shared.envelope import Unreadable
from shared.errors import ConfigError, MillpondError, Poisoned, ProviderError
from shared.faults import fault_point
from shared.keys import PartitionKeys
from shared.outbox import error_payload
from shared.providers.breaker import Breaker
from shared.providers.chain import Answered, Chains, ask
from shared.providers.limits import RateLimits
from shared.scripts import SCRIPTS
from shared.settings import Settings
from shared.tiers.l3 import L3
from shared.touches import Touches
from workers.consumer import Consumer, Message, messages_of, server_ms
from workers.crew import Crew
from workers.database import OneL3
from workers.flight import Fill, LeaseLost, Outcome, Progress
from workers.runtime import run_crew
from workers.settling import Settling
from workers.tally import Tally

log = logging.getLogger("millpond.worker")

#: A fill that waited longer than this (ms) may have been abandoned by everyone meanwhile.
_STALE_MS = 5000
_NO_ERROR = ("ok", "cancelled")


class LLMConsumer(Consumer):
    """Computes the flights of one partition, up to `slots` at once."""

    group = keys.LLM_GROUP

    def __init__(
        self,
        crew: Crew,
        partition_keys: PartitionKeys,
        *,
        chains: Chains,
        limits: RateLimits,
        slots: int,
        breaker: Breaker | None = None,
        l3: L3 | None = None,
    ) -> None:
        super().__init__(crew, partition_keys)
        self.chains = chains
        self.limits = limits
        self.breaker = breaker
        self.slots = slots
        self._touches = Touches(self.keys.touches, self.settings.touches_limit)
        self.settling = Settling(self, Tally(self._touches), l3)
        self._active: dict[tuple[str, bytes], tuple[Fill, asyncio.Task[None]]] = {}
        self._clearing: set[asyncio.Task[None]] = set()
        self._burials: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._refreshes_wait = False

    @property
    def lease(self) -> float:
        """As configured for LLM workers."""
        return self.settings.llm_lease

    @property
    def streams(self) -> tuple[str, ...]:
        """Fills someone waits for, then refreshes."""
        return (self.keys.fills, self.keys.refreshes)

    def in_hand(self, stream: str, message_id: bytes) -> bool:
        """Being computed."""
        return (stream, message_id) in self._active

    def when_handled(self, stream: str, message_id: bytes, then: Callable[[], None]) -> None:
        """When its flight has ended."""
        if (stream, message_id) in self._active:
            self._active[stream, message_id][1].add_done_callback(lambda _: then())
        else:
            then()

    def room(self) -> int:
        """Free slots."""
        return self.slots - len(self._active)

    def room_for(self, stream: str) -> int:
        """Free slots; what a dead worker left of refreshes must not keep fills waiting either."""
        return self._share_of_refreshes() if stream == self.keys.refreshes else self.room()

    async def turn(self) -> None:
        """Take what there are slots for."""
        if self.room() <= 0:
            self._slot_freed.clear()
            try:
                await asyncio.wait_for(self._slot_freed.wait(), self.tick)
            except TimeoutError:
                return
        # Before the slot goes to a new fill: what a dead worker left has waited longer.
        await self.reclaim_when_due()
        if self.room() <= 0:
            return
        # While refreshes are there to be computed, an empty look at the fills must not cost a wait.
        block = None if self._refreshes_wait else min(self.tick, 0.25)
        await self._read(self.keys.fills, self.room(), block)
        # Room that is left was offered to the fills: none waits. That some always come must not starve the refreshes.
        # Somebody may wait for one that a dead worker had begun: those go first, even if new ones have all their room.
        await self.reclaim_when_due()
        begins_none = self.crew.pressure or self.reclaim_is_due(self.keys.refreshes)
        room = 0 if begins_none else self._share_of_refreshes()
        self._refreshes_wait = room > 0 and await self._read(self.keys.refreshes, room, None)

    def _share_of_refreshes(self) -> int:
        """Free slots among the half that refreshes may take: no fill waits for them."""
        taken = sum(stream == self.keys.refreshes for stream, _ in self._active)
        return min(self.room(), max(self.slots // 2, 1) - taken)

    async def _read(self, stream: str, room: int, block: float | None) -> bool:
        commands = [self.read_command(stream, room, block=block), ("TIME",)]
        read, now = self.checked(await self.read(commands))
        messages = messages_of(read[0][1]) if read else []
        if messages:
            fault_point("llm_after_read")
        for message in messages:
            # What waited long is looked at again before it is paid for, like what was reclaimed.
            waited_ms = server_ms(now) - int(message.id.split(b"-")[0])
            self._begin(stream, message, resumed=waited_ms > _STALE_MS)
        if messages:
            await asyncio.sleep(0)  # the calls go out before the next read does
        return bool(messages)

    async def handle_reclaimed(self, stream: str, messages: list[Message], since_ms: int) -> None:
        """Finish what another worker began: deliver what had landed, compute the rest."""
        for message in messages:
            self._begin(stream, message, resumed=True)

    async def tell_poisoned(self, stream: str, message: Message, since_ms: int) -> None:
        """End the flight with `Poisoned` for everyone aboard."""
        try:
            fill = Fill.read(stream, message)
        except (ValueError, KeyError, TypeError):
            return
        error = Poisoned("this request repeatedly ended the workers that computed it; it lies in the dead letters")
        waiters, recorded = self.keys.waiters(fill.key, fill.token), self.keys.outcome(fill.key, fill.token)
        try:
            outcome = await self.settling.fail(fill, error)
        except Unreadable:  # it has an outcome, of a version this one cannot read
            aboard = await self.link.call(("LRANGE", waiters, 0, -1))
            outcome = Outcome(since_ms, aboard, error_payload(error), error_payload(error))
        await self.settling.tell(outcome)
        await self.link.call(("DEL", waiters, recorded))

    async def drain(self) -> None:
        """Let calls in flight finish for a while; cancel the rest, to be handed back."""
        tasks = [*(task for _, task in self._active.values()), *self._burials]
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.drain_timeout)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.link.send(self._touches.report(now=True))

    # leases

    async def renew_leases(self) -> None:
        """Several times per lease; those that are lost are cancelled."""
        while True:
            # Soon after it began, too: a flight outlives its first waiters' deadlines only once it is renewed.
            await asyncio.sleep(min(self.lease / 5, 1.0))
            held = list(self._active.values())
            try:
                if held:
                    await self._renew(held)
                await self.link.send(self._touches.report())
            except Exception as error:
                log.warning("%s: leases not renewed (%r)", self.name, error)

    async def _renew(self, held: list[tuple[Fill, asyncio.Task[None]]]) -> None:
        k, commands, order = self.keys, [], []
        for stream in self.streams:
            fills = [(fill, task) for fill, task in held if fill.stream == stream]
            if fills:
                order += fills
                names = [n for f, _ in fills for n in (k.flight(f.key), k.waiters(f.key, f.token))]
                marks = [m for f, _ in fills for m in (f.id, f.token)]
                keep_ms = int(self.lease * 2000)
                commands.append(SCRIPTS["renew"].call([stream, *names], [self.group, self.name, keep_ms, *marks]))
        kept = [flag for reply in await self.link.send(commands) for flag in reply]
        for (fill, task), owned in zip(order, kept, strict=True):
            # What is being cleared may have been, and is nobody's then; if it is another's, `clear` says so.
            if not owned and task not in self._clearing and not task.done():
                self.counters.add("leases_lost")
                log.warning("%s: lost the lease of %s", self.name, fill.id.decode())
                task.cancel()

    # one flight

    def _begin(self, stream: str, message: Message, *, resumed: bool) -> None:
        if (stream, message.id) in self._active:
            return
        try:
            fill = Fill.read(stream, message)
        except (ValueError, KeyError, TypeError) as error:
            burial = asyncio.create_task(self.bury(stream, message.id, _problem(error), message.deliveries))
            self._burials.add(burial)
            burial.add_done_callback(self._burials.discard)
            burial.add_done_callback(_report)
            return
        task = asyncio.create_task(self._fly(fill, resumed=resumed))
        self._active[stream, fill.id] = (fill, task)
        task.add_done_callback(partial(self._ended, (stream, fill.id)))

    def _ended(self, taken: tuple[str, bytes], task: asyncio.Task[None]) -> None:
        self._active.pop(taken, None)
        self._clearing.discard(task)
        self._slot_freed.set()
        _report(task)

    async def _fly(self, fill: Fill, *, resumed: bool) -> None:
        """Compute, land, tell, clear. A crash anywhere is finished by whoever reclaims the fill."""
        settling = self.settling
        try:
            outcome = await settling.resume(fill) if resumed else None
            if outcome is None:
                outcome = await self._compute(fill)
            fault_point("llm_after_land")
            await settling.tell(outcome)
            fault_point("llm_after_reply")
            self._clearing.add(self._active[fill.stream, fill.id][1])
            await settling.clear(fill)
        except LeaseLost:
            self.counters.add("leases_lost")
            log.warning("%s: %s belongs to another worker; nothing written", self.name, fill.id.decode())

    async def _compute(self, fill: Fill) -> Outcome:
        """Ask the chain and settle the flight."""
        began, progress = time.monotonic(), Progress()
        patience = asyncio.create_task(self._placate(fill, progress)) if fill.soft_timeout_ms else None
        try:
            answered = await self._ask(fill, progress)
        except MillpondError as error:
            return await self.settling.fail(fill, error, progress)
        except Exception as error:
            log.exception("%s: a flight failed unexpectedly", self.name)
            failure = ProviderError(f"unexpected {type(error).__name__}: {error}")
            return await self.settling.fail(fill, failure, progress)
        finally:
            if patience is not None:
                patience.cancel()
                await asyncio.gather(patience, return_exceptions=True)
        fault_point("llm_after_compute")
        return await self.settling.land(fill, answered, progress, int((time.monotonic() - began) * 1000))

    async def _ask(self, fill: Fill, progress: Progress) -> Answered:
        body: dict[str, Any] = {"model": fill.model, **orjson.loads(fill.body)}
        routes = self.chains.of(fill.about["profile"])
        attempts = progress.attempts
        try:
            return await ask(
                routes,
                fill.endpoint,
                body,
                self.settings,
                breaker=self.breaker,
                limits=self.limits,
                attempts=attempts,
            )
        finally:
            self.counters.add("provider_calls", len(attempts))
            self.counters.add("provider_errors", sum(one["outcome"] not in _NO_ERROR for one in attempts))

    async def _placate(self, fill: Fill, progress: Progress) -> None:
        """Give who waits what is kept for errors, each time the soft time-out has passed."""
        while True:
            await asyncio.sleep(fill.soft_timeout_ms / 1000)
            try:
                outcome = await self.settling.placate(fill, progress.placated)
                if outcome is not None:
                    await self.settling.tell(outcome)
                    progress.placated += len(outcome.waiters)
                    self.counters.add("degraded", len(outcome.waiters))
            except LeaseLost:
                return  # the heart will see it too, and end the call


def _problem(error: Exception) -> str:
    return f"not a fill: no field {error}" if isinstance(error, KeyError) else f"not a fill: {error}"


def _report(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a flight ended unexpectedly; its fill will be reclaimed", exc_info=error)


async def run(settings: Settings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Run an LLM worker over every partition until `stop` is set.

    Raises:
        ConfigError: fewer slots than partitions, or a provider, chain or resolver that cannot be had.
    """
    chains = Chains(settings)
    chains.check()
    url = resolve_url(settings)
    limits, breaker = RateLimits(settings, url), Breaker(settings, url)
    l3 = OneL3(settings, timeout=settings.l3_timeout, connections=1)

    def consumer(crew: Crew, partition_keys: PartitionKeys) -> LLMConsumer:
        if settings.concurrency < crew.partitions:
            raise ConfigError(
                f"an LLM worker reads all {crew.partitions} partitions and needs a slot for each: "
                f"set MILLPOND_CONCURRENCY (or --concurrency) to at least {crew.partitions}",
                field="concurrency",
            )
        # A fixed share each: a slot borrowed by an idle partition's blocking read would starve a busy one.
        share, more = divmod(settings.concurrency, crew.partitions)
        slots = share + (partition_keys.partition < more)
        return LLMConsumer(
            crew,
            partition_keys,
            chains=chains,
            limits=limits,
            breaker=breaker,
            l3=l3.of(crew),
            slots=slots,
        )

    try:
        await run_crew("llm", settings, stop, on_ready, consumer)
    finally:
        await chains.close()
        await breaker.close()
        await limits.close()
        await l3.close()
