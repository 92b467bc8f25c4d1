"""A client whose Redis is away: it says so, answers what it may, and finds its way back by itself."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millpond import Client, ConfigError, DeadlineExceeded, Unavailable
from producers.degraded import Memory
from producers.reply import Reply
from shared.embedded import EmbeddedRedis
from shared.values import Encoded
from tests import faults_support
from tests.faults_support import Pond, answers, outcomes, until
from tests.processes import our_code_environment
from tests.proxy import Proxy

pond = faults_support.pond
own_pond = faults_support.own_pond

PROMPT = "What is a mill leat?"
AFTER = 0.3


def client_of(pond: Pond, how: Any, url: str | None = None, **changes: Any) -> Client:
    return Client(settings=pond.with_(url, **changes), degraded=how, degrade_after=AFTER)


async def cut_off(proxy: Proxy) -> None:
    proxy.refuse = True
    await proxy.cut()


def computing_for(client: Client) -> int:
    """Return how many wait for what this client computes without Redis."""
    assert client._fallback is not None
    return sum(flight.waiting for flight in client._fallback._flights.values())


def is_away(client: Client) -> bool:
    return client._fallback is not None and client._fallback.active


async def test_what_it_has_seen_is_answered_from_its_own_memory(pond: Pond, partitions: int) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup", "llm"),
        client_of(pond, "cache-only", proxy.url) as c,
    ):
        seen = await c.ask(PROMPT, ttl=100)
        again = await c.ask(PROMPT)
        assert (again.tier in ("l1", "l2"), again.degraded) == (True, False)
        await cut_off(proxy)
        found = await c.ask(PROMPT)
        assert (found.tier, found.degraded, found.collapsed) == ("l1", True, False)
        assert (found.text, found.key) == (seen.text, seen.key)
        assert 0 < found.ttl < 100
        with pytest.raises(Unavailable):
            await c.ask("What is a mill never seen?")
        for how in ({"tenant": "other"}, {"mode": "refresh"}, {"max_age": 0.0}):
            with pytest.raises(Unavailable):
                await c.ask(PROMPT, **how)
        proxy.refuse = False
        await until(lambda: not is_away(c), "it is back")
        back = await c.ask(PROMPT)
        assert (back.tier in ("l1", "l2"), back.degraded) == (True, False)
    assert pond.calls() == 1


async def test_what_it_has_not_seen_is_asked_of_the_provider_once_for_all(pond: Pond, partitions: int) -> None:
    async with Proxy.to(pond.url) as proxy, client_of(pond, "direct", proxy.url) as client:
        await cut_off(proxy)
        found = await answers([client.ask(PROMPT) for _ in range(20)])
        assert {(reply.tier, reply.degraded, reply.stored) for reply in found} == {("llm", True, False)}
        assert sorted(reply.collapsed for reply in found) == [False] + [True] * 19
        assert len({reply.text for reply in found}) == 1
        assert found[0].provider == "simulated"
        assert len({reply.request_id for reply in found}) == 20
        again = await client.ask(PROMPT)
        assert (again.tier, again.degraded) == ("l1", True)
        other = await client.ask(PROMPT, tenant="other")
        assert other.tier == "llm"
        await client.ask(PROMPT, mode="bypass")
    assert pond.calls() == 3


async def test_requests_that_wait_when_it_goes_away_are_answered_too(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy, client_of(pond, "direct", proxy.url) as client:
        asked = [asyncio.create_task(client.ask(f"{PROMPT} {n}")) for n in range(5)]
        await until(lambda: pond.length("requests") == 5, "they are published, and nobody works")
        await cut_off(proxy)
        found = await answers(asked)
        assert all(reply.degraded for reply in found)
        proxy.refuse = False
        await until(lambda: not is_away(client), "it is back")
        async with pond.working("lookup", "llm"):
            assert not (await client.ask("What is another mill?")).degraded
            await pond.settled()
        assert client._waiting == {}


async def test_a_leader_cut_off_while_it_is_computed_by_workers_gets_one_answer(pond: Pond) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup", "llm", simulated_first_token=1.0),
        client_of(pond, "direct", proxy.url) as client,
    ):
        asked = asyncio.create_task(client.ask(PROMPT))
        await until(lambda: pond.calls() == 1, "a worker computes")
        await cut_off(proxy)
        assert (await asked).degraded
        proxy.refuse = False
        await until(lambda: not is_away(client), "it is back")
        assert not (await client.ask(PROMPT)).degraded
        await pond.settled()
    assert pond.calls() == 2, "the worker's, and its own"


async def test_a_killed_server_that_comes_back_is_used_again(own_pond: Pond, own_server: EmbeddedRedis) -> None:
    async with client_of(own_pond, "direct") as client:
        async with own_pond.working("lookup", "llm"):
            assert not (await client.ask(PROMPT)).degraded
        own_server.kill()
        assert (await client.ask(PROMPT)).tier == "l1"
        assert (await client.ask("What is another mill?")).degraded
        with pytest.raises(Unavailable):
            await client.invalidate(everything=True)
        own_server.restart()
        await until(lambda: not is_away(client), "it is back")
        async with own_pond.working("lookup", "llm"):
            await client.invalidate(everything=True)
            back = await client.ask(PROMPT)
            assert (back.tier, back.degraded) == ("llm", False)


async def test_a_server_that_hangs_is_away_too(pond: Pond) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup", "llm"),
        client_of(pond, "direct", proxy.url) as client,
    ):
        await client.ask(PROMPT)
        proxy.delay = 30.0
        found = await asyncio.wait_for(client.ask(PROMPT), 10)
        assert (found.tier, found.degraded) == ("l1", True)
        proxy.delay = 0.0
        await proxy.cut()
        await until(lambda: not is_away(client), "it is back")
        assert not (await client.ask(PROMPT)).degraded


async def test_a_short_outage_is_waited_out(pond: Pond) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup", "llm"),
        Client(settings=pond.with_(proxy.url), degraded="direct", degrade_after=20) as client,
    ):
        await client.ask(PROMPT)
        await cut_off(proxy)
        asked = asyncio.create_task(client.ask(PROMPT))
        await until(lambda: proxy.refused > 2, "it tries to connect")
        proxy.refuse = False
        assert not (await asked).degraded
    assert pond.calls() == 1


async def test_a_client_that_starts_without_a_server_answers_and_connects_later(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy, pond.working("lookup", "llm"):
        proxy.refuse = True
        async with client_of(pond, "direct", proxy.url) as client:
            assert (await client.ask(PROMPT)).degraded
            proxy.refuse = False
            async with asyncio.timeout(5):
                while (await client.ask(PROMPT)).degraded:
                    pass  # it tries to connect no more often than each second


async def test_by_default_requests_wait_for_the_server_until_their_deadline(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy, pond.working("lookup", "llm"), pond.client(proxy.url) as client:
        await client.ask(PROMPT)
        await cut_off(proxy)
        (found,) = await outcomes([client.ask(PROMPT, timeout=0.5)])
        assert isinstance(found, DeadlineExceeded)


async def test_an_invalidation_forgets_what_was_seen_and_what_was_asked_before_it(pond: Pond) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup", "llm"),
        client_of(pond, "cache-only", proxy.url) as client,
    ):
        await client.ask(PROMPT, tags=["doc:1"])
        early = asyncio.create_task(client.ask("What is a slow mill?"))
        await until(lambda: pond.calls() == 2, "it is computed")
        await client.invalidate(tags=["doc:1"])
        await early
        await cut_off(proxy)
        found = await outcomes([client.ask(PROMPT), client.ask("What is a slow mill?")])
        assert [type(one) for one in found] == [Unavailable] * 2


# values


async def test_values_are_kept_and_computed_without_redis(pond: Pond) -> None:
    runs, going = [], asyncio.Event()

    async def work() -> bytes:
        runs.append(1)
        await going.wait()
        return b"flour"

    async with Proxy.to(pond.url) as proxy, pond.working("lookup"), client_of(pond, "direct", proxy.url) as client:
        await client.put("retrieval", "a", 1)
        assert await client.get("retrieval", "a")
        await cut_off(proxy)
        found = await client.get("retrieval", "a")
        assert (found.value, found.degraded) == (1, True)
        with pytest.raises(Unavailable):
            await client.get("retrieval", "b")
        with pytest.raises(Unavailable):
            await client.put("retrieval", "b", 1)
        asked = [asyncio.create_task(client.get_or_compute("retrieval", "b", work)) for _ in range(5)]
        await until(lambda: computing_for(client) == 5, "all wait for one run")
        going.set()
        assert await asyncio.gather(*asked) == [b"flour"] * 5
        assert await client.get_or_compute("retrieval", "b", work) == b"flour"
        with pytest.raises(ZeroDivisionError):
            await client.get_or_compute("retrieval", "c", lambda: 1 // 0)
        assert runs == [1]
        proxy.refuse = False
        await until(lambda: not is_away(client), "it is back")
        assert await client.get_or_compute("retrieval", "b", work) == b"flour"
        assert runs == [1, 1], "what was computed without Redis is in no cache of its"


async def test_who_waits_for_anothers_computation_computes_when_redis_goes_away(pond: Pond) -> None:
    going = asyncio.Event()

    async def slow() -> str:
        await going.wait()
        return "slow"

    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup"),
        pond.client() as other,
        client_of(pond, "direct", proxy.url) as client,
    ):
        leading = asyncio.create_task(other.get_or_compute("retrieval", "a", slow))
        await until(lambda: pond.found("{mp:*}:flight:*"), "another computes")
        asked = asyncio.create_task(client.get_or_compute("retrieval", "a", lambda: "own"))
        await until(lambda: pond.found("{mp:*}:waiters:*"), "it waits")
        await cut_off(proxy)
        assert await asked == "own"
        going.set()
        assert await leading == "slow"


async def test_the_last_who_leaves_ends_the_call(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy:
        proxy.refuse = True
        async with client_of(pond, "direct", proxy.url, simulated_first_token=60.0) as client:
            asked = [asyncio.create_task(client.ask(PROMPT, timeout=0.3)) for _ in range(2)]
            assert [type(one) for one in await outcomes(asked)] == [DeadlineExceeded] * 2
            assert client._fallback is not None
            await until(lambda: client._fallback is not None and not client._fallback._flights, "nothing is computed")


# choosing it


@pytest.mark.parametrize("how", ["Direct", "", None])
def test_a_choice_there_is_not_is_refused(pond: Pond, how: Any) -> None:
    with pytest.raises(ConfigError, match="cache-only"):
        Client(settings=pond.settings, degraded=how)


def test_direct_without_what_it_needs_is_refused_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['stamina'] = None\n"
        "from millpond import Client, ConfigError\n"
        "try: Client('redis://localhost:1', degraded='direct')\n"
        "except ConfigError as error: print(error)\n"
        "Client('redis://localhost:1', degraded='cache-only'); print('fine')\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=our_code_environment()
    )
    assert said.returncode == 0, said.stderr
    assert "millpond[workers]" in said.stdout
    assert "fine" in said.stdout


# its memory


def kept(key: str, size: int = 10) -> Reply:
    members = {"tier": "llm", "collapsed": False, "stored": "stored", "age": 0, "ttl": 9, "key": key, "model": "m"}
    return Reply(Encoded(b'"' + b"x" * size + b'"').payload(members), "1")


def test_memory_is_bounded_and_forgets_the_longest_unused() -> None:
    memory = Memory(entries=2, size=10_000)
    for key in "ab":
        memory.put(kept(key), 100)
    assert memory.get("a", "2")
    memory.put(kept("c"), 100)
    assert [bool(memory.get(key, "2")) for key in "abc"] == [True, False, True]
    memory.put(kept("d", 9000), 100)
    assert [bool(memory.get(key, "2")) for key in "acd"] == [False, False, True]
    memory.put(kept("d", 20_000), 100)
    assert len(memory) == 0
    memory.put(kept("e"), 0)
    assert memory.get("e", "2") is None


async def test_memory_holds_nothing_past_its_time() -> None:
    memory = Memory(entries=2, size=10_000)
    memory.put(kept("a"), 0.02)
    await until(lambda: memory.get("a", "2") is None, "it is forgotten")
    assert len(memory) == 0
