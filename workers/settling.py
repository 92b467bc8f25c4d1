"""How a flight ends: landed or failed, told, cleared.

Every write is fenced by ownership, and repeated until it is known to have run: the write, never the paid call.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson

from shared import prices
from shared.entry import pack, unpack
from shared.envelope import Unreadable
from shared.errors import ContentFiltered, MillpondError, ProviderError, ProviderTimeout, ProviderUnreachable
from shared.link import LINK_ERRORS, Command
from shared.outbox import Outbox
from shared.providers.breaker import CircuitOpen
from shared.providers.chain import Answered
from shared.providers.gate import verdict
from shared.scripts import SCRIPTS, Arg, Script
from shared.tiers import l2
from shared.tiers.l3 import L3
from workers.consumer import Consumer
from workers.flight import Fill, LeaseLost, Outcome, Progress
from workers.tally import Tally

log = logging.getLogger("millpond.worker")

_OUTCOME_MS = 120_000
#: How much shorter probation is while Redis' memory is above its mark.
_SQUEEZE = 10


class Settling:
    """Settles the flights of one consumer."""

    def __init__(self, consumer: Consumer, tally: Tally, l3: L3 | None = None) -> None:
        self._consumer = consumer
        self._tally = tally
        self._l3 = l3
        self._keys = consumer.keys
        self._settings = consumer.settings
        self._counters = consumer.counters

    async def resume(self, fill: Fill) -> Outcome | None:
        """Return what a fill had already come to; None when it is to be computed."""
        reply = await self._write(SCRIPTS["resume"], self._flight_names(fill), [fill.id, fill.token])
        if reply[0] == b"ABANDONED":
            self._counters.add("abandoned")
            return Outcome(0, [], b"", b"")
        return Outcome.recorded(fill, reply) if reply[0] == b"DONE" else None

    async def land(self, fill: Fill, answered: Answered, progress: Progress, compute_ms: int) -> Outcome:
        """Publish an answer."""
        completion = answered.completion
        gate = "" if completion.judged else verdict(completion.body, fill.endpoint)
        if gate == "not_json":
            error = ProviderError("the provider's answer is not JSON", provider=answered.provider)
            return await self.fail(fill, error, progress)
        body = completion.body if completion.judged else completion.body.strip()
        tokens = completion.prompt_tokens, completion.completion_tokens
        spent = prices.cost(answered.model, *tokens, self._settings.prices) if any(tokens) else None
        meta, packed = pack(
            body,
            model=fill.model,
            compute_ms=compute_ms,
            compress_above=self._settings.compress_above,
            provider=answered.provider,
            tokens=tokens,
            cost=spent,
            value=completion.value,
        )
        call = self._call(fill, progress, answered.provider, answered.model, compute_ms, tokens, spent)
        k, (stream, flight, waiters, outcome) = self._keys, self._flight_names(fill)
        names = [
            stream, k.entry(fill.key), flight, waiters, outcome, k.tags, k.landed, k.invalidations, k.failed(fill.key)
        ]  # fmt: skip
        probation_ms = fill.probation_ms // _SQUEEZE if self._consumer.crew.pressure else fill.probation_ms
        args: list[Arg] = [
            fill.id, fill.key, fill.token, fill.epoch, fill.tags, fill.ttl_ms,
            gate, _OUTCOME_MS, meta, packed, self._settings.invalidation_limit,
            fill.stale_ms, fill.error_ms, max(probation_ms, 1), call,
            fill.body if self._settings.store_prompts else b"", self._settings.landed_limit,
        ]  # fmt: skip
        reply = await self._write(SCRIPTS["land"], names, args)
        if reply[0] == b"DONE":
            return Outcome.recorded(fill, reply)
        self._counters.add("stored" if reply[0] == b"stored" else "not_stored")
        self._counters.add("tokens.prompt", completion.prompt_tokens)
        self._counters.add("tokens.completion", completion.completion_tokens)
        landed = Outcome.landed(fill, reply, body, answered.provider, completion.value)
        self._tally.ended(fill, landed, progress.placated, tokens=tokens, cost=spent, saved_ms=compute_ms)
        return landed

    async def fail(self, fill: Fill, error: MillpondError, progress: Progress | None = None) -> Outcome:
        """End a flight that has no answer: with an entry kept for that case, else with its error.

        Raises:
            Unreadable: it has an outcome already, of a version that this one cannot read.
        """
        call = b""
        if progress is not None and progress.attempts:
            last = progress.attempts[-1]
            took = sum(one["duration_ms"] for one in progress.attempts)
            call = self._call(fill, progress, last["provider"], last["model"], took)
        k = self._keys
        names = [*self._flight_names(fill), k.entry(fill.key), k.tags, k.failed(fill.key), k.landed]
        args: list[Arg] = [
            fill.id, fill.token, orjson.dumps(error.to_wire()), _OUTCOME_MS, fill.key,
            fill.negative_ms if is_passing(error) else 0, error.code,
            call, self._settings.landed_limit,
        ]  # fmt: skip
        await self._bring_back(fill)
        reply = await self._write(SCRIPTS["fail"], names, args)
        outcome = Outcome.recorded(fill, reply)
        if reply[0] == b"FAILED":
            self._counters.add("failed")
            if outcome.spare is not None:
                self._tally.ended(fill, outcome, progress.placated if progress is not None else 0)
                self._counters.add("degraded", len(outcome.waiters))
        return outcome

    async def placate(self, fill: Fill, told: int) -> Outcome | None:
        """Return what those aboard, save the first `told`, may have while the flight goes on, if there is anything."""
        if not told:
            await self._bring_back(fill)
        k, (stream, flight, waiters, _) = self._keys, self._flight_names(fill)
        names = [stream, flight, waiters, k.entry(fill.key), k.tags]
        reply = await self._write(SCRIPTS["placate"], names, [fill.id, fill.token, fill.key, told])
        if reply[0] == b"NONE":
            return None
        try:
            # Those who take no stored answer get none, and wait on.
            outcome = Outcome.standing_in(unpack(fill.key, reply[3]), reply[1], reply[2], strict=b"")
        except Unreadable:
            return None
        self._tally.placated(fill, outcome)
        return outcome

    async def tell(self, outcome: Outcome) -> None:
        """Reply to everyone aboard. Settling renewed the lease; past a part of it the server refuses the replies."""
        outbox = Outbox(self._settings.reply_limit)
        outbox.add_waiters(outcome.waiters, outcome.first, outcome.rest, outcome.strict)
        sent = await self._persist(outbox.take(outcome.now_ms + int(self._consumer.lease * 800)))
        if -1 in sent:
            raise LeaseLost

    async def clear(self, fill: Fill) -> None:
        """Forget an ended flight."""
        stream, _, waiters, outcome = self._flight_names(fill)
        args: list[Arg] = [self._consumer.group, self._consumer.name, fill.id]
        (cleared,) = await self._persist([SCRIPTS["clear"].call([stream, waiters, outcome], args)])
        if not cleared:
            raise LeaseLost

    async def _bring_back(self, fill: Fill) -> None:
        """Have an entry that is kept for errors, and has left Redis, back from PostgreSQL if it can be had.

        A lookup has looked there already, unless PostgreSQL was too slow for it.
        """
        refreshed = fill.stream == self._keys.refreshes or fill.mode in ("refresh", "bypass")
        if self._l3 is None or not self._l3.open or not fill.error_ms or refreshed:
            return
        k, entry = self._keys, self._keys.entry(fill.key)
        there, fence = await self._persist([("EXISTS", entry), ("HGET", k.tags, "#fence")])
        found = {} if there else await self._l3.find([fill.key])
        if fill.key in found:
            kept = l2.Kept(fill.key, found[fill.key], fill.probation_ms)
            await self._persist([l2.rehydrate(k, fence or b"0", [kept])])

    def _flight_names(self, fill: Fill) -> tuple[str, str, str, str]:
        k, key, token = self._keys, fill.key, fill.token
        return fill.stream, k.flight(key), k.waiters(key, token), k.outcome(key, token)

    def _call(
        self,
        fill: Fill,
        progress: Progress,
        provider: str,
        model: str,
        duration_ms: int,
        tokens: tuple[int, int] = (0, 0),
        cost: float | None = None,
    ) -> bytes:
        """Return what is told of a flight to the durable tier (JSON); its attempts only if there was more than one."""
        kind = "refresh" if fill.stream == self._keys.refreshes else "fill"
        told = fill.about | {"endpoint": fill.endpoint, "kind": kind}
        if len(progress.attempts) > 1:
            told["attempts"] = progress.attempts
        # Who tells of an answer, or of the last error, is who was asked last.
        if progress.attempts[-1:] and progress.attempts[-1].get("simulated"):
            told["simulated"] = True
        told |= {"provider": provider, "model": model, "tokens": tokens, "cost": cost, "duration_ms": duration_ms}
        return orjson.dumps(told)

    async def _write(self, script: Script, names: list[str] | tuple[str, ...], args: list[Arg]) -> list[Any]:
        command = script.call(names, [self._consumer.group, self._consumer.name, *args])
        (reply,) = await self._persist([command])
        if reply[0] == b"LOST":
            raise LeaseLost
        return list(reply)

    async def _persist(self, commands: list[Command]) -> list[Any]:
        """Send until it is known to have run: each script here gives the same result when it runs again."""
        pause = 0.05
        while True:
            try:
                return await self._consumer.link.send(commands)
            except LINK_ERRORS as error:
                log.warning("%s: a result could not be written (%s); trying again", self._consumer.name, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)


def is_passing(error: MillpondError) -> bool:
    """Whether others who ask the same soon would get the same error: the provider's state, or refused content.

    Not what another may be spared (an unexpected failure, a dead letter), nor a 4xx that a corrected setting cures; nor
    an open circuit: it spares the provider by itself, and says nothing of this question.
    """
    if isinstance(error, CircuitOpen):
        return False
    if isinstance(error, ProviderTimeout | ProviderUnreachable | ContentFiltered):
        return True
    return isinstance(error, ProviderError) and error.status is not None and (error.retryable or error.status >= 500)
