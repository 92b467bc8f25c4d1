"""What is answered when a provider fails or is slow: an entry kept for that case, the error once more, or the error."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest

from producers.client import Client
from producers.reply import Reply
from shared import keys
from shared.errors import ProviderError
from tests import faults_support
from tests.faults_support import Pond, Raw, outcomes, until
from tests.outages import Outage

pond = faults_support.pond

PROMPT = "What is a mill race?"
#: Fresh for 0.05 s; kept for a minute in case the provider fails.
KEPT = {"ttl": 0.05, "stale_if_error": 60.0, "negative_ttl": 0.0, "early_refresh": 0.0}


@pytest.fixture
def outage(pond: Pond) -> Outage:
    """Outages of a deployment whose provider answers at once."""
    pond.options |= {"simulated_first_token": 0.0, "attempts": 1, "profiles": {"response": KEPT}}
    return Outage(pond)


async def past_its_ttl(pond: Pond, client: Client, prompt: str = PROMPT, **how: Any) -> Reply:
    """Have an answer stored, and wait until it is no longer fresh."""
    reply = await client.ask(prompt, **how)
    await pond.aged()
    return reply


async def test_an_entry_kept_for_errors_stands_in_for_everyone_who_waits(pond: Pond, outage: Outage) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        first = await past_its_ttl(pond, client)
        outage.begin()
        found = await asyncio.gather(*(client.ask(PROMPT) for _ in range(5)))
        await pond.settled()
    assert {(one.tier, one.stale, one.degraded, one.text) for one in found} == {("l2", True, True, first.text)}
    assert sorted(one.collapsed for one in found) == [False, True, True, True, True]
    assert pond.calls() == 2


async def test_who_takes_no_stored_answer_gets_the_error_of_the_same_flight(pond: Pond, outage: Outage) -> None:
    pond.options |= {"simulated_first_token": 0.3}
    async with pond.working("lookup", "llm"), pond.client() as client:
        await past_its_ttl(pond, client)
        outage.begin()
        asked = [client.ask(PROMPT), client.ask(PROMPT, mode="refresh"), client.ask(PROMPT, max_age=0.01)]
        found = await outcomes([asyncio.ensure_future(one) for one in asked])
    assert [type(one) for one in found] == [Reply, ProviderError, ProviderError]


async def test_what_was_invalidated_never_stands_in(pond: Pond, outage: Outage) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        await past_its_ttl(pond, client, tags=["a"])
        outage.begin()
        await client.invalidate(tags=["a"])
        with pytest.raises(ProviderError):
            await client.ask(PROMPT, tags=["a"])


async def test_a_flight_that_no_stored_answer_may_help_tells_its_error(pond: Pond, outage: Outage) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        await past_its_ttl(pond, client, tags=["a"])
        outage.begin()
        await client.invalidate(tags=["b"])  # not the entry's: but what it says of `b` is not known
        with pytest.raises(ProviderError):
            await client.ask(PROMPT, tags=["b"])
        assert (await client.ask(PROMPT)).degraded


@pytest.mark.parametrize("point", ["llm_after_land", "llm_after_reply"])
async def test_a_crash_after_the_failure_tells_the_same(pond: Pond, outage: Outage, point: str) -> None:
    raw = Raw(pond)
    async with pond.working("lookup"):
        async with pond.working("llm"), pond.client() as client:
            first = await past_its_ttl(pond, client)
        outage.begin()
        async with pond.process("llm", fault=f"kill@{point}") as victim:
            raw.publish("r1", PROMPT)
            assert await asyncio.to_thread(victim.wait) == -9
        outage.end()
        async with pond.working("llm"):
            reply = await raw.answered("r1")
            await pond.settled()
    assert {one["degraded"] for one in raw.replies("r1")} == {True}
    assert (reply["body"], pond.calls()) == (first.body, 2)


async def test_an_error_is_answered_again_for_a_while_and_longer_each_time(pond: Pond, outage: Outage) -> None:
    pond.options |= {"profiles": {"response": {"negative_ttl": 0.2}}}
    outage.begin()
    async with pond.working("lookup", "llm"), pond.client() as client:
        spans = []
        for failures in (1, 2, 3):
            with pytest.raises(ProviderError):
                await client.ask(PROMPT)
            assert pond.calls() == failures
            found = await outcomes([asyncio.ensure_future(client.ask(PROMPT)) for _ in range(3)])
            assert {getattr(one, "status", None) for one in found} == {503}
            assert pond.calls() == failures, "the provider is left alone"
            line, problem = pond.redis.get(pond.names(PROMPT).failed(pond.key(PROMPT))).split(b"\n")
            until_ms, count = map(int, line.split())
            spans.append(until_ms / 1000 - time.time())
            assert (count, orjson.loads(problem)["status"]) == (failures, 503)
            await pond.past(until_ms)
        outage.end()
        assert (await client.ask(PROMPT)).tier == "llm"
        assert not pond.redis.exists(pond.names(PROMPT).failed(pond.key(PROMPT)))
    assert spans[0] <= 0.2 < spans[1] <= 0.4 < spans[2] <= 0.8


@pytest.mark.parametrize(("status", "kept"), [(503, True), (429, True), (451, True), (400, False), (401, False)])
async def test_only_what_others_would_get_too_is_answered_again(
    pond: Pond, outage: Outage, status: int, kept: bool
) -> None:
    pond.options |= {"profiles": {"response": {"negative_ttl": 30.0}}}
    outage.begin(f"simulated {status}")
    async with pond.working("lookup", "llm"), pond.client() as client:
        for _ in range(2):
            with pytest.raises(ProviderError):
                await client.ask(PROMPT)
        assert pond.calls() == (1 if kept else 2)
        with pytest.raises(ProviderError):
            await client.ask(PROMPT, mode="refresh")
        assert pond.calls() == (2 if kept else 3), "who wants it computed is not answered with an old error"


async def test_after_the_soft_time_out_a_stored_answer_is_told_and_the_flight_lands(pond: Pond, outage: Outage) -> None:
    pond.options |= {"profiles": {"response": KEPT | {"ttl": 0.3, "soft_timeout": 0.1}}}
    async with pond.working("lookup"), pond.client() as client:
        async with pond.working("llm"):
            await client.ask(PROMPT)
            await pond.aged()
        async with pond.working("llm", simulated_first_token=0.6):
            began = time.monotonic()
            strict = asyncio.create_task(client.ask(PROMPT, mode="refresh"))
            early = [asyncio.create_task(client.ask(PROMPT)) for _ in range(3)]
            first = await asyncio.gather(*early)
            late = asyncio.create_task(client.ask(PROMPT))  # comes aboard after the others were told
            assert (await late).degraded
            waited = time.monotonic() - began
            computed = await strict
            await pond.settled()
            after = await client.ask(PROMPT)
    assert {(one.stale, one.degraded, one.tier) for one in first} == {(True, True, "l2")}
    assert waited < 0.5
    assert (computed.degraded, computed.tier, computed.stored) == (False, "llm", True)
    assert after.tier in ("l1", "l2")
    assert pond.calls() == 2


async def test_a_refresh_that_fails_disturbs_nobody_and_backs_off(pond: Pond, outage: Outage) -> None:
    pond.options |= {
        "profiles": {"response": {"ttl": 0.05, "stale_while_revalidate": 60.0, "negative_ttl": 30.0}},
    }
    async with pond.working("lookup", "llm"), pond.client() as client:
        await past_its_ttl(pond, client)
        outage.begin()
        assert (await client.ask(PROMPT)).stale
        await until(lambda: pond.calls() == 2, "the refresh was tried")
        await pond.settled()
        assert pond.redis.exists(pond.names(PROMPT).failed(pond.key(PROMPT)))
        reply = await client.ask(PROMPT)
        await pond.settled()
    assert (reply.stale, reply.degraded, pond.calls()) == (True, False, 2)


def refresh(pond: Pond, number: int) -> None:
    """Have an answer computed that nobody waits for."""
    k, key = pond.names("x"), f"{number:032x}"
    spec = {"endpoint": "chat/completions", "model": "m", "tags": [], "ttl_ms": 60_000}
    body = orjson.dumps({"messages": [{"role": "user", "content": f"refresh {number}"}]})
    flight = {"token": "t", "epoch": "0-0", "tags": "", "ttl": 60_000, "store": "1"}
    pond.redis.hset(k.flight(key), mapping=flight)
    pond.redis.pexpire(k.flight(key), 60_000)
    fill = {"key": key, "token": "t", "epoch": "0-0", "body": body, "spec": orjson.dumps(spec)}
    pond.redis.xadd(k.refreshes, fill)


async def test_refreshes_take_half_the_slots_at_most(pond: Pond, outage: Outage) -> None:
    pond.options |= {"concurrency": 4, "simulated_first_token": 0.4, "profiles": {"response": KEPT}}
    async with pond.working("lookup", "llm"), pond.client() as client:
        for n in range(6):
            refresh(pond, n)
        await until(lambda: pond.calls() == 2, "two are being computed")
        began = time.monotonic()
        await asyncio.gather(*(client.ask(f"fill {n}") for n in range(2)))
        assert time.monotonic() - began < 0.75, "the fills found slots of their own"
        await pond.settled()
    assert pond.calls() == 8


async def test_under_memory_pressure_no_refresh_runs_and_probation_is_short(pond: Pond, outage: Outage) -> None:
    pond.options |= {"profiles": {"response": {"probation": 100.0}}}
    pond.redis.xgroup_create(pond.names("x").landed, "persistence", "0", mkstream=True)
    pond.redis.set(keys.PRESSURE, "1", px=60_000)
    async with pond.working("lookup", "llm"), pond.client() as client:
        await until(lambda: len(pond.found("mp:worker:*")) == 2, "the workers' first heartbeats")
        await client.ask(PROMPT)
        refresh(pond, 1)
        await client.ask(f"{PROMPT} Again?")
        assert 5_000 < pond.redis.pttl(pond.names(PROMPT).entry(pond.key(PROMPT))) <= 10_000
        assert (pond.calls(), pond.length("refreshes")) == (2, 1)
        pond.redis.delete(keys.PRESSURE)
        await until(lambda: pond.calls() == 3, "the refresh runs once the pressure is over")
        await pond.settled()
