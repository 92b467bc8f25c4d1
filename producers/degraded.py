"""What a client does while Redis cannot be reached: answers from what it has seen, or calls the provider itself.

Nothing here is looked at while Redis answers. What others invalidate meanwhile this client cannot know; what it
invalidates itself needs Redis, and fails loudly.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import orjson

from producers.lead import run
from producers.publisher import Outgoing
from producers.reply import Reply
from shared.errors import ConfigError, ProviderError, Unavailable
from shared.messages import Question, Rules, understand
from shared.profiles import DEFAULT_PROFILE
from shared.settings import Settings
from shared.values import APPLICATION, Encoded, encode

if TYPE_CHECKING:
    from shared.providers.chain import Chains

Degraded = Literal["fail", "cache-only", "direct"]


class Memory:
    """A client's own L1: the newest stored replies it has seen, bounded by entries and bytes, while they are fresh."""

    def __init__(self, *, entries: int, size: int) -> None:
        self._most = entries
        self._most_bytes = size
        self._bytes = 0
        #: key -> when it was received and until when it is fresh (seconds, monotonic), the reply
        self._held: OrderedDict[str, tuple[float, float, Reply]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def put(self, reply: Reply, ttl: float) -> None:
        """Hold a reply for `ttl` seconds."""
        self._drop(reply.key)
        if ttl <= 0 or reply.size > self._most_bytes or not self._most:
            return
        now = time.monotonic()
        self._held[reply.key] = now, now + ttl, reply
        self._bytes += reply.size
        while len(self._held) > self._most or self._bytes > self._most_bytes:
            self._drop(next(iter(self._held)))

    def get(self, key: str, request_id: str, max_age: float | None = None) -> Reply | None:
        """Return what is held for `key`, marked degraded, its age counted on."""
        held = self._held.get(key)
        if held is None:
            return None
        received, until, reply = held
        now = time.monotonic()
        if now >= until:
            self._drop(key)
            return None
        age = reply.age + now - received
        if max_age is not None and age > max_age:
            return None
        self._held.move_to_end(key)
        said = {"tier": "l1", "collapsed": False, "stored": "stored", "age": age, "ttl": until - now, "degraded": True}
        return reply.retold(request_id, said)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._bytes = 0

    def _drop(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= held[2].size


@dataclass(slots=True)
class _Flight:
    task: asyncio.Task[Reply]
    waiting: int = 0


class Fallback:
    """Answers requests without Redis, as `how` says; `after` seconds after it was last heard."""

    def __init__(self, how: Degraded, after: float, settings: Settings, rules: Rules) -> None:
        self.how = how
        self.after = after
        #: whether Redis has been out of reach for longer than `after`
        self.active = False
        #: rises with every invalidation this client issues: what was asked before it is not remembered after it
        self.clock = 0
        self.memory = Memory(entries=settings.l1_entries, size=settings.l1_bytes)
        self._settings = settings
        self._rules = rules
        self._flights: dict[str, _Flight] = {}
        self._chains: Chains | None = _chains(settings) if how == "direct" else None

    @classmethod
    def make(cls, how: Degraded, after: float, settings: Settings, rules: Rules) -> Self | None:
        """Return the fallback that was chosen; None for `fail`.

        Raises:
            ConfigError: there is no such choice, or `direct` lacks what calls the provider.
        """
        if how not in get_args(Degraded):
            raise ConfigError(f"degraded must be one of {', '.join(get_args(Degraded))}, not {how!r}", field="degraded")
        if not after > 0:
            raise ConfigError(
                f"degrade_after must be a positive number of seconds, not {after!r}", field="degrade_after"
            )
        return None if how == "fail" else cls(how, after, settings, rules)

    def remember(self, reply: Reply, clock: int) -> None:
        """Hold a reply Redis' workers gave, unless something was invalidated since it was asked for."""
        if clock == self.clock and reply.stored and not reply.stale and not reply.degraded:
            self.memory.put(reply, reply.ttl)

    def invalidated(self) -> None:
        """Forget everything: which answers a label concerned, only the workers know."""
        self.clock += 1
        self.memory.clear()

    async def close(self) -> None:
        """End what is being computed."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._chains is not None:
            await self._chains.close()

    async def answer(self, outgoing: Outgoing) -> Reply | None:
        """Answer one request; None when the application that asks is to compute it.

        Raises:
            Unavailable: there is no answer without Redis.
            MillpondError: the provider failed, or the request is malformed.
        """
        question = understand(outgoing.body, outgoing.cache, self._rules)
        if held := self._held(question, outgoing.request_id):
            return held
        if self.how == "cache-only" or question.mode == "only-if-cached":
            raise Unavailable(
                "Redis cannot be reached, and this client has not seen the answer; `millpond doctor` says more"
            )
        if outgoing.lead:
            return None
        if question.mode == "bypass":
            return await self._ask_provider(question, outgoing)
        reply, collapsed = await self._shared(question.key, lambda: self._ask_provider(question, outgoing))
        return reply.retold(outgoing.request_id, {"collapsed": collapsed})

    def _held(self, question: Question, request_id: str) -> Reply | None:
        if not question.reads:
            return None
        max_age = None if question.max_age_ms is None else question.max_age_ms / 1000
        return self.memory.get(question.key, request_id, max_age)

    async def compute(self, body: bytes, cache: bytes, function: Callable[[], Any]) -> Any:
        """Run an application's function, once for all in this process who ask for the key; return its value.

        Raises:
            Exception: whatever it raised.
        """
        question = understand(body, cache, self._rules)

        async def work() -> Reply:
            value = encode(await run(function))
            return self._kept(question, value, APPLICATION, "app")

        reply, _ = await self._shared(question.key, work)
        return reply.value

    async def _shared(self, key: str, work: Callable[[], Awaitable[Reply]]) -> tuple[Reply, bool]:
        """Run `work` unless it is running for this key; it ends when the last who waits for it leaves."""
        flight = self._flights.get(key)
        collapsed = flight is not None
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(_awaited(work)))
        flight.waiting += 1
        try:
            await asyncio.wait({flight.task})
            if flight.task.cancelled():
                raise Unavailable("the client was closed")
            return flight.task.result(), collapsed
        finally:
            flight.waiting -= 1
            if (flight.task.done() or not flight.waiting) and self._flights.get(key) is flight:
                del self._flights[key]  # whoever comes now begins anew
            if not flight.waiting:
                flight.task.cancel()

    async def _ask_provider(self, question: Question, outgoing: Outgoing) -> Reply:
        from shared.providers.chain import ask
        from shared.providers.gate import verdict

        assert self._chains is not None  # noqa: S101 (only `direct` comes here)
        body: dict[str, Any] = {"model": question.model, **orjson.loads(outgoing.body)}
        answered = await ask(self._chains.of(question.profile), question.endpoint, body, self._settings)
        completion = answered.completion
        gate = "" if completion.judged else verdict(completion.body, question.endpoint)
        if gate == "not_json":
            raise ProviderError("the provider's answer is not JSON", provider=answered.provider)
        value = Encoded(completion.body if completion.judged else completion.body.strip(), completion.value)
        return self._kept(question, value, answered.provider, "llm", keep=not gate)

    def _kept(self, question: Question, value: Encoded, provider: str, tier: str, *, keep: bool = True) -> Reply:
        members: dict[str, Any] = {"tier": tier, "collapsed": False, "stored": "degraded", "age": 0.0, "ttl": 0.0}
        members |= {"degraded": True, "key": question.key, "model": question.model, "provider": provider}
        reply = Reply(value.payload(members | {"epoch": "0-0"}), "")
        if keep and question.stores:
            self.memory.put(reply, question.ttl_ms / 1000)
        return reply


async def _awaited(work: Callable[[], Awaitable[Reply]]) -> Reply:
    return await work()


def _chains(settings: Settings) -> Chains:
    try:
        from shared.providers.chain import Chains
    except ImportError as error:
        raise ConfigError(
            f"degraded='direct' calls the provider from here, which needs more than the client ({error}): "
            "pip install 'millpond[workers]', or choose 'cache-only'",
            field="degraded",
        ) from None
    chains = Chains(settings)
    chains.of(DEFAULT_PROFILE)  # what is missing is said now, not when Redis is
    return chains
