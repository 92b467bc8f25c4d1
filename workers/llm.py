"""The LLM worker: computes flights, lands them, tells everyone aboard.

It takes as many fills as it has free slots, refreshes only when no fill waits, and renews what it computes five times
per lease. Whatever it writes is fenced by ownership; when it loses a lease it cancels the call and writes nothing.
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
from shared.entry import Unreadable, pack
from shared.errors import ConfigError, MillpondError, Poisoned, ProviderError, Unavailable
from shared.faults import fault_point
from shared.keys import PartitionKeys
from shared.link import LINK_ERRORS, Command
from shared.prices import cost
from shared.providers import make_provider
from shared.providers.base import Call, Completion, Provider
from shared.providers.gate import verdict
from shared.providers.limits import RateLimits, estimate_tokens
from shared.providers.retry import with_retries
from shared.scripts import SCRIPTS, Arg
from shared.settings import Settings
from workers.consumer import Consumer, Message, messages_of, server_ms
from workers.crew import Crew
from workers.flight import Fill, LeaseLost, Outcome
from workers.outbox import Outbox, error_payload
from workers.runtime import run_crew

log = logging.getLogger("millpond.worker")

_OUTCOME_MS = 120_000
#: A fill that waited longer than this (ms) may have been abandoned by everyone meanwhile.
_STALE_MS = 5000


class LLMConsumer(Consumer):
    """Computes the flights of one partition, up to `slots` at once."""

    group = keys.LLM_GROUP

    def __init__(
        self, crew: Crew, partition_keys: PartitionKeys, *, provider: Provider, limits: RateLimits, slots: int
    ) -> None:
        super().__init__(crew, partition_keys)
        self.provider = provider
        self.limits = limits
        self.slots = slots
        self._active: dict[tuple[str, bytes], tuple[Fill, asyncio.Task[None]]] = {}
        self._burials: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._heart: asyncio.Task[None] | None = None
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

    async def prepare(self) -> None:
        """Create the groups and keep the heart beating."""
        await super().prepare()
        if self._heart is None:
            self._heart = asyncio.create_task(self._renew_leases())

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
        if not await self._read(self.keys.fills, block):
            self._refreshes_wait = await self._read(self.keys.refreshes, None)

    async def _read(self, stream: str, block: float | None) -> bool:
        commands = [self.read_command(stream, self.room(), block=block), ("TIME",)]
        read, now = self.checked(await self.read(commands))
        messages = messages_of(read[0][1]) if read else []
        if messages:
            fault_point("llm_after_read")
        for message in messages:
            # What waited long is looked at again before it is paid for, like what was reclaimed.
            waited_ms = server_ms(now) - int(message.id.split(b"-")[0])
            self._begin(stream, message, resumed=waited_ms > _STALE_MS)
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
            outcome = await self._fail(fill, error)
        except Unreadable:  # it has an outcome, of a version this one cannot read
            aboard = await self.link.call(("LRANGE", waiters, 0, -1))
            outcome = Outcome(since_ms, aboard, error_payload(error), error_payload(error))
        await self._tell(outcome)
        await self.link.call(("DEL", waiters, recorded))

    async def drain(self) -> None:
        """Let calls in flight finish for a while; cancel the rest, to be handed back."""
        tasks = [*(task for _, task in self._active.values()), *self._burials]
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.drain_timeout)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def leave(self) -> None:
        """Let the heart stand still."""
        if self._heart is not None:
            self._heart.cancel()

    # leases

    async def _renew_leases(self) -> None:
        while True:
            # Soon after it began, too: a flight outlives its first waiters' deadlines only once it is renewed.
            await asyncio.sleep(min(self.lease / 5, 1.0))
            if not self._active:
                continue
            held = list(self._active.values())
            try:
                await self._renew(held)
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
            if not owned and self._active.get((fill.stream, fill.id), (None, None))[1] is task:
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
        self._slot_freed.set()
        _report(task)

    async def _fly(self, fill: Fill, *, resumed: bool) -> None:
        """Compute, land, tell, clear. A crash anywhere is finished by whoever reclaims the fill."""
        try:
            outcome = await self._resume(fill) if resumed else None
            if outcome is None:
                outcome = await self._compute(fill)
            fault_point("llm_after_land")
            await self._tell(outcome)
            fault_point("llm_after_reply")
            await self._clear(fill)
        except LeaseLost:
            self.counters.add("leases_lost")
            log.warning("%s: %s belongs to another worker; nothing written", self.name, fill.id.decode())

    async def _resume(self, fill: Fill) -> Outcome | None:
        """Return what a fill had already come to; None when it is to be computed."""
        k, key, token = self.keys, fill.key, fill.token
        names = [fill.stream, k.flight(key), k.waiters(key, token), k.outcome(key, token)]
        reply = await self._write(SCRIPTS["resume"].call(names, [self.group, self.name, fill.id, token]))
        if reply[0] == b"ABANDONED":
            self.counters.add("abandoned")
            return Outcome(0, [], b"", b"")
        return Outcome.recorded(fill, reply) if reply[0] == b"DONE" else None

    async def _compute(self, fill: Fill) -> Outcome:
        """Call the provider and settle the flight."""
        began = time.monotonic()
        try:
            completion = await self._ask_provider(fill)
        except MillpondError as error:
            return await self._fail(fill, error)
        except Exception as error:
            log.exception("%s: the provider failed unexpectedly", self.name)
            return await self._fail(fill, ProviderError(f"unexpected {type(error).__name__}: {error}"))
        fault_point("llm_after_compute")
        return await self._land(fill, completion, int((time.monotonic() - began) * 1000))

    async def _ask_provider(self, fill: Fill) -> Completion:
        body: dict[str, Any] = {"model": fill.model, **orjson.loads(fill.body)}

        async def attempt(timeout: float) -> Completion:
            return await self.provider.complete(Call(fill.endpoint, body, timeout))

        async def admit() -> None:
            while True:
                try:
                    return await self.limits.acquire(estimate_tokens(body, fill.endpoint))
                except Unavailable:
                    await asyncio.sleep(0.2)

        return await with_retries(
            attempt,
            self.settings,
            provider=self.provider.name,
            admit=admit if self.limits.active else None,
            on_attempt=lambda _: self.counters.add("provider_calls"),
            on_error=lambda _: self.counters.add("provider_errors"),
        )

    async def _land(self, fill: Fill, completion: Completion, compute_ms: int) -> Outcome:
        gate = verdict(completion.body, fill.endpoint)
        if gate == "not_json":
            return await self._fail(
                fill, ProviderError("the provider's answer is not JSON", provider=self.provider.name)
            )
        body = completion.body.strip()
        tokens = completion.prompt_tokens, completion.completion_tokens
        spent = cost(fill.model, *tokens)
        meta, packed = pack(
            body,
            model=fill.model,
            compute_ms=compute_ms,
            compress_above=self.settings.compress_above,
            provider=self.provider.name,
            tokens=tokens,
            cost=spent,
        )
        call = fill.about | {
            "model": fill.model,
            "endpoint": fill.endpoint,
            "provider": self.provider.name,
            "tokens": tokens,
            "cost": spent,
            "duration_ms": compute_ms,
        }
        k, key, token = self.keys, fill.key, fill.token
        names = [
            fill.stream, k.entry(key), k.flight(key), k.waiters(key, token), k.outcome(key, token), k.tags, k.landed,
            k.invalidations, k.failed(key),
        ]  # fmt: skip
        args: list[Arg] = [
            self.group, self.name, fill.id, key, token, fill.epoch, fill.tags, fill.ttl_ms,
            gate, _OUTCOME_MS, meta, packed, self.settings.invalidation_limit,
            fill.stale_ms, fill.error_ms, fill.probation_ms, orjson.dumps(call),
            fill.body if self.settings.store_prompts else b"", self.settings.landed_limit,
        ]  # fmt: skip
        reply = await self._write(SCRIPTS["land"].call(names, args))
        if reply[0] == b"DONE":
            return Outcome.recorded(fill, reply)
        self.counters.add("stored" if reply[0] == b"stored" else "not_stored")
        self.counters.add("tokens.prompt", completion.prompt_tokens)
        self.counters.add("tokens.completion", completion.completion_tokens)
        return Outcome.landed(fill, reply, body, self.provider.name)

    async def _fail(self, fill: Fill, error: MillpondError) -> Outcome:
        k, key, token = self.keys, fill.key, fill.token
        names = [fill.stream, k.flight(key), k.waiters(key, token), k.outcome(key, token)]
        args: list[Arg] = [self.group, self.name, fill.id, token, orjson.dumps(error.to_wire()), _OUTCOME_MS]
        reply = await self._write(SCRIPTS["fail"].call(names, args))
        if reply[0] == b"DONE":
            return Outcome.recorded(fill, reply)
        self.counters.add("failed")
        return Outcome(reply[1], reply[2], error_payload(error), error_payload(error))

    async def _tell(self, outcome: Outcome) -> None:
        """Reply to everyone aboard. Settling renewed the lease; past a part of it the server refuses the replies."""
        outbox = Outbox(self.settings.reply_limit)
        outbox.add_waiters(outcome.waiters, outcome.first, outcome.rest)
        sent = await self._persist(outbox.take(outcome.now_ms + int(self.lease * 800)))
        if -1 in sent:
            raise LeaseLost

    async def _clear(self, fill: Fill) -> None:
        k, key, token = self.keys, fill.key, fill.token
        names = [fill.stream, k.waiters(key, token), k.outcome(key, token)]
        (cleared,) = await self._persist([SCRIPTS["clear"].call(names, [self.group, self.name, fill.id])])
        if not cleared:
            raise LeaseLost

    # the final writes are repeated, never the paid call

    async def _write(self, command: Command) -> list[Any]:
        (reply,) = await self._persist([command])
        if reply[0] == b"LOST":
            raise LeaseLost
        return list(reply)

    async def _persist(self, commands: list[Command]) -> list[Any]:
        """Send until it is known to have run: each script here gives the same result when it runs again."""
        pause = 0.05
        while True:
            try:
                return await self.link.send(commands)
            except LINK_ERRORS as error:
                log.warning("%s: a result could not be written (%s); trying again", self.name, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)


def _problem(error: Exception) -> str:
    return f"not a fill: no field {error}" if isinstance(error, KeyError) else f"not a fill: {error}"


def _report(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a flight ended unexpectedly; its fill will be reclaimed", exc_info=error)


async def run(settings: Settings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Run an LLM worker over every partition until `stop` is set.

    Raises:
        ConfigError: fewer slots than partitions, or the provider is not configured.
    """
    provider = make_provider(settings)
    limits = RateLimits(settings, resolve_url(settings))

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
        return LLMConsumer(crew, partition_keys, provider=provider, limits=limits, slots=slots)

    try:
        await run_crew("llm", settings, stop, on_ready, consumer)
    finally:
        await provider.close()
        await limits.close()
