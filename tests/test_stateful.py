"""L1, L2, flights and invalidations together answer exactly what a small model says, in whatever order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import orjson
import pytest
import redis
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from shared import keys, messages
from shared.entry import unpack
from shared.errors import ProviderError
from shared.keys import PartitionKeys
from shared.messages import Question, Rules, understand
from shared.providers.base import Call, Completion, Provider
from shared.providers.chain import Chains, Route
from shared.providers.limits import RateLimits
from shared.scripts import SCRIPTS, Arg, Script
from shared.settings import Settings, load
from shared.tiers.l1 import L1
from tests.conftest import SEED, Server
from tests.tiers_model import Flight, Model, Stored
from workers.consumer import server_ms
from workers.crew import Crew
from workers.llm import LLMConsumer
from workers.lookup import LookupConsumer

T = TypeVar("T")
CLIENT = "model"
SHORT = 0.03
TAGS = ["a", "b"]
QUESTION = b'{"messages":[{"role":"user","content":"x"}]}'
WORKER, TENANT = st.integers(0, 1), st.sampled_from(["t", "u"])
TAGGED = st.sampled_from([[], ["a"], ["a", "b"]])
ENDINGS = {"stop": "", "length": "length", "error": "failed"}


class Numbered:
    """A provider whose answers are numbers, given when the test says so and ending as it says."""

    name = "numbered"

    def __init__(self) -> None:
        self.calls: list[tuple[int, asyncio.Future[str]]] = []
        self.called = asyncio.Event()

    async def complete(self, call: Call) -> Completion:
        """Answer with this call's number."""
        number, ending = len(self.calls), asyncio.get_running_loop().create_future()
        self.calls.append((number, ending))
        self.called.set()
        finish = await ending
        if finish == "error":
            raise ProviderError(f"call {number} failed", status=400)
        choice = {"message": {"role": "assistant", "content": str(number)}, "finish_reason": finish}
        return Completion.read(orjson.dumps({"choices": [choice]}))

    async def close(self) -> None:
        """Nothing to give up."""


class OneChain(Chains):
    """One provider for every profile."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    def of(self, profile: str) -> tuple[Route, ...]:
        """Return the chain of that one provider."""
        return (Route(self.provider.name, self.provider),)


class Tiers(RuleBasedStateMachine):
    """Two lookup workers with a small L1 each and an LLM worker, in this process, on a real server."""

    url = ""
    data_dir = Path()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model = Model()
        self.provider = Numbered()
        self.open: list[tuple[Flight, asyncio.Future[str]]] = []
        self.asked = 0
        self.last: dict[str, Any] = {}
        self.read = b"0-0"
        self.shortest = 0
        self.k = PartitionKeys(0)
        # Nothing kept for errors and nothing refreshed early: the model knows answers by their time to live alone.
        plain = {"response": {"ttl": 86400, "stale_if_error": 0, "early_refresh": 0}}
        self.settings: Settings = load(redis_url=self.url, data_dir=self.data_dir, l1_entries=2, profiles=plain)
        self.understood = Rules.of(self.settings)
        self.do(self.begin())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in this example's loop."""
        return self.runner.run(work)

    async def begin(self) -> None:
        """Empty the server and start the consumers, without their loops."""
        crews = [Crew(kind, self.settings, self.url, 1, name) for kind, name in
                 (("lookup", "one"), ("lookup", "two"), ("llm", "three"))]  # fmt: skip
        self.lookups = [LookupConsumer(crew, self.k) for crew in crews[:2]]
        self.link = self.lookups[0].link
        self.limits = RateLimits(self.settings, self.url)
        self.llm = LLMConsumer(crews[2], self.k, chains=OneChain(self.provider), limits=self.limits, slots=100)
        await self.link.send(
            [("FLUSHALL",), ("XADD", keys.reply(CLIENT), "1-0", "", ""), ("PEXPIRE", keys.reply(CLIENT), 600_000)]
        )
        self.read = b"1-0"
        for consumer in (*self.lookups, self.llm):
            await consumer.prepare()

    async def now(self) -> int:
        """Return the server's clock in milliseconds."""
        return server_ms(await self.link.call(("TIME",)))

    async def replies(self) -> dict[str, dict[str, Any]]:
        """Return what the client was told since the last call."""
        told: dict[str, dict[str, Any]] = {}
        for at, fields in await self.link.call(("XRANGE", keys.reply(CLIENT), b"(" + self.read, "+")):
            self.read = at
            for ids, payload in zip(fields[::2], fields[1::2], strict=True):
                told |= dict.fromkeys(ids.decode().split(), orjson.loads(payload))
        return told

    @rule(worker=WORKER, tenant=TENANT, tags=TAGGED)
    def ask(self, worker: int, tenant: str, tags: list[str]) -> None:
        """One worker handles a plain request."""
        self.last = {"tenant": tenant, "tags": tags}
        self.do(self._ask(self.lookups[worker], self.last))

    @rule(worker=WORKER, tenant=TENANT, tags=TAGGED)
    def ask_and_land(self, worker: int, tenant: str, tags: list[str]) -> None:
        """The same, and all that is computed lands."""
        self.ask(worker, tenant, tags)
        while self.open:
            self.land(0, "stop")

    @rule(worker=WORKER)
    def ask_again(self, worker: int) -> None:
        """The same or the other worker handles the same request again."""
        self.do(self._ask(self.lookups[worker], self.last))

    @rule(
        worker=WORKER, tenant=TENANT, tags=TAGGED,
        mode=st.sampled_from(["default", "refresh", "only-if-cached", "no-store", "bypass"]),
        max_age=st.sampled_from([None, 0, 3600]),
        ttl=st.sampled_from([3600, SHORT]),
    )  # fmt: skip
    def ask_otherwise(
        self, worker: int, tenant: str, tags: list[str], mode: str, max_age: int | None, ttl: float
    ) -> None:
        """One worker handles a request with directives of all kinds."""
        cache = {"tenant": tenant, "mode": mode, "tags": tags, "ttl": ttl}
        cache |= {} if max_age is None else {"max_age": max_age}
        self.do(self._ask(self.lookups[worker], cache))

    async def _ask(self, worker: LookupConsumer, directives: dict[str, Any]) -> None:
        cache = orjson.dumps(directives)
        q = understand(QUESTION, cache, self.understood)
        self.asked += 1
        name, before = f"r{self.asked}", await self.now()
        request: list[Arg] = [1000, name, CLIENT, before + 3_000_000, QUESTION, cache]
        await self.link.call(SCRIPTS["publish"].call([self.k.requests], request))
        await worker.turn()
        await worker.drain()
        after, told = await self.now(), await self.replies()
        entry = self.model.hit(q)
        sure = entry is not None and entry.expires_ms > after and q.max_age_ms != 0
        # In its last millisecond Redis still has it, and L1 does not.
        possible = entry is not None and entry.expires_ms >= before
        reply = told.pop(name, None)
        if possible and (sure or (reply and "error" not in reply)):
            assert entry is not None and reply is not None, "a stored answer was not found"
            self._check_hit(q, entry, reply)
        elif q.mode == "only-if-cached":
            assert reply is not None and reply.get("error", {}).get("code") == "not_cached"
        else:
            assert reply is None, f"answered with {reply} instead of a computation"
            await self._await_flight(q, name)
        assert told == {}, "somebody was told what the model does not know of"

    def _check_hit(self, q: Question, entry: Stored, reply: dict[str, Any]) -> None:
        assert reply["tier"] in ("l1", "l2")
        assert (reply["key"], reply["stored"], reply["collapsed"]) == (q.key, "stored", False)
        assert reply["body"]["choices"][0]["message"]["content"] == str(entry.number)
        assert q.max_age_ms is None or reply["age"] * 1000 <= q.max_age_ms

    async def _await_flight(self, q: Question, name: str) -> None:
        number = len(self.provider.calls)
        flight = self.model.aboard(q, name, number)
        begun = flight.number == number
        assert await self.link.call(("XLEN", self.k.fills)) == len(self.open) + begun
        if begun:
            self.provider.called.clear()
            await self.llm.turn()
            await self.provider.called.wait()
            self.open.append((flight, self.provider.calls[number][1]))

    @rule(which=st.integers(0, 1000), ending=st.sampled_from(["stop", "stop", "stop", "length", "error"]))
    def land(self, which: int, ending: str) -> None:
        """A provider's call ends, if one is under way. No precondition: an expiry may fall either side of a step."""
        if self.open:
            self.do(self._land(*self.open.pop(which % len(self.open)), ending))

    async def _land(self, flight: Flight, call: asyncio.Future[str], ending: str) -> None:
        call.set_result(ending)
        await asyncio.wait([task for fill, task in self.llm._active.values() if fill.key == flight.key], timeout=5,
                           return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        told = await self.replies()
        reason = self.model.land(flight, ENDINGS[ending])
        assert sorted(told) == sorted(flight.waiters)
        for name, reply in told.items():
            if reason == "failed":
                assert reply["error"]["message"] == f"call {flight.number} failed"
                continue
            assert (reply["tier"], reply["stored"]) == ("llm", reason)
            assert reply["collapsed"] == (name != flight.waiters[0])
            assert reply["body"]["choices"][0]["message"]["content"] == str(flight.number)
        if reason == "stored":
            assert {reply["ttl"] for reply in told.values()} == {flight.ttl_ms / 1000}
            await self._look_at_stored(flight)

    async def _look_at_stored(self, flight: Flight) -> None:
        text = await self.link.call(("GET", self.k.entry(flight.key)))
        now = await self.now()
        if text is None:
            assert flight.ttl_ms <= SHORT * 1000, "an answer was not stored"
            self.model.stored.pop(flight.tenant, None)
            return
        entry = unpack(flight.key, text)
        assert set(entry.tags) == flight.tags
        assert entry.expires_ms - entry.created_ms == flight.ttl_ms
        self.model.stored[flight.tenant] = Stored(
            flight.number, flight.key, flight.began, flight.tags, entry.created_ms, entry.expires_ms
        )
        if flight.ttl_ms <= SHORT * 1000:
            self.shortest = max(self.shortest, entry.expires_ms, now)

    @rule(tag=st.sampled_from([*TAGS, *TAGS, "tenant:t", "profile:response", "all", "key:"]))
    def invalidate(self, tag: str) -> None:
        """Something is invalidated."""
        known = {s.key for s in self.model.stored.values()} | {f.key for f in self.model.flights.values()}
        self._invalidate([f"key:{min(known)}"] if tag == "key:" and known else [tag])

    def _invalidate(self, tags: list[str]) -> None:
        self.do(self.link.call(SCRIPTS["invalidate"].call([self.k.invalidations, self.k.tags], ["t", 1000, *tags])))
        self.model.invalidate(set(tags))

    @rule(trim=st.booleans())
    def pass_time(self, trim: bool) -> None:
        """What lives shortly ends; the log may lose its past, so that its followers find a gap."""
        if trim:
            self.do(self.link.call(("XTRIM", self.k.invalidations, "MAXLEN", 1)))
        if self.shortest:
            self.do(self._expire())

    async def _expire(self) -> None:
        left = self.shortest - await self.now()
        await asyncio.sleep(max(0, left) / 1000 + 0.002)
        assert await self.now() > self.shortest
        self.shortest = 0

    def teardown(self) -> None:
        """Whatever is open lands; nothing is left but what is stored."""
        try:
            while self.open:
                self.land(0, "stop")
            self.do(self._look_at_leftovers())
        finally:
            self.do(self._close())
            self.runner.close()

    async def _look_at_leftovers(self) -> None:
        for consumer in self.lookups:
            await consumer.drain()
        with redis.Redis.from_url(self.url) as connection:
            left = {name.decode().split(":")[2] for name in connection.scan_iter("{mp:0}:*")}
        assert left <= {"requests", "fills", "refreshes", "invalidations", "tags", "entry"}
        assert await self.link.send([("XLEN", self.k.fills), ("XLEN", self.k.requests)]) == [0, 0]

    async def _close(self) -> None:
        for consumer in (self.llm, *self.lookups):
            await consumer.reading.close()
            await consumer.link.close()
        await self.limits.close()


def run_against_the_model(server: Server, tmp_path: Path, **limits: Any) -> None:
    class Here(Tiers):
        url = server.url
        data_dir = tmp_path

    run_state_machine_as_test(
        hypothesis.seed(SEED)(Here),
        settings=hypothesis.settings(
            stateful_step_count=50, deadline=None, print_blob=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck), **limits,
        ),
    )  # fmt: skip


def test_the_tiers_answer_what_the_model_says(server: Server, tmp_path: Path) -> None:
    run_against_the_model(server, tmp_path, max_examples=100)


def without(name: str, text: str, instead: str = "") -> Script:
    """Return a script with one thing it does left out."""
    assert text in SCRIPTS[name].source, f"{name}.lua no longer has {text!r}: correct this test"
    return Script(name, SCRIPTS[name].source.replace(text, instead))


HOLES = {
    "L1 deaf to the log": lambda patch: patch.setattr(L1, "invalidate", lambda self, tags: None),
    "a replaced answer stays in L1": lambda patch: patch.setitem(
        SCRIPTS, "land", without("land", "tell_replaced(KEYS[8], ARGV[13], key)")
    ),
    "L2 asks for no tag of the request": lambda patch: patch.setitem(
        SCRIPTS, "fetch", without("fetch", " and fit_for(KEYS[1], key, lines(asked), entry)")
    ),
    "tenants share a key": lambda patch: patch.setattr(messages, "_key", _keyed_without_tenant(messages._key)),
}


def _keyed_without_tenant(real: Callable[..., str]) -> Callable[..., str]:
    def keyed(content: Any, name: str, profile: Any, tenant: str, *rest: Any) -> str:
        return real(content, name, profile, "", *rest)

    return keyed


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.leaves("an example that failed is not cleaned up")
def test_a_hole_is_found(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hole: str) -> None:
    HOLES[hole](monkeypatch)
    with server.connect() as connection:
        for script in SCRIPTS.values():
            connection.script_load(script.source)
    # Where time decides too, what was found may not be found again: hypothesis calls that flaky.
    with pytest.raises((AssertionError, Flaky)):
        run_against_the_model(server, tmp_path, max_examples=1500, phases=[hypothesis.Phase.generate])
