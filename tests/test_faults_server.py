"""The server restarts, forgets everything or loses its scripts: every request ends well, nothing stale is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from producers.reply import Reply
from shared.embedded import EmbeddedRedis
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, until
from tests.proxy import Proxy

pond = faults_support.pond
own_pond = faults_support.own_pond

PROMPT = "What is a mill wheel?"


async def in_every_stage(pond: Pond, ask: Callable[[str], asyncio.Task[Reply]]) -> list[asyncio.Task[Reply]]:
    """Ask so that, on return, some are answered, some being computed, some wait for a slot, some are just published.

    Needs an LLM worker with fewer than twelve slots.
    """
    asked = [ask(f"{PROMPT} ({n})") for n in range(24)]
    await until(lambda: pond.calls() > 12, "some are answered, some in progress")
    asked += [ask(f"{PROMPT} ({n})") for n in range(30)]
    assert pond.length("fills") > 0
    await asyncio.sleep(0)
    return asked


async def called_more_than(pond: Pond, times: int) -> None:
    await until(lambda: pond.calls() > times, "some are being computed")


async def turned_away(times: int, *proxies: Proxy) -> None:
    """Wait until whoever connects through each proxy has tried so many more times, and found no server behind it."""
    enough = {proxy: proxy.refused + times for proxy in proxies}
    await until(lambda: all(proxy.refused >= n for proxy, n in enough.items()), "each has tried again and again")


@pytest.mark.parametrize("how", ["sigterm", "sigkill"])
async def test_a_restarted_server_costs_nobody_an_answer(
    own_pond: Pond, own_server: EmbeddedRedis, partitions: int, how: str
) -> None:
    pond = own_pond
    pond.options |= {"concurrency": 8, "llm_lease": 3.0, "lookup_lease": 3.0}
    # What a killed server has not yet written is lost with `everysec`; here the question is what we do with the rest.
    pond.redis.config_set("appendfsync", "always")
    async with pond.working("lookup", "llm"), pond.client() as client:
        asked = await in_every_stage(pond, lambda prompt: asyncio.create_task(client.ask(prompt)))
        if how == "sigkill":
            own_server.kill()
        own_server.restart()
        await answers(asked)
        await pond.settled()
        assert (await client.ask(f"{PROMPT} (0)")).tier in ("l1", "l2")
    assert pond.calls() <= 30 + pond.stat("leases_lost")


@pytest.mark.parametrize("how", ["sigterm", "sigkill"])
async def test_an_acknowledged_invalidation_outlives_a_restart(
    own_pond: Pond, own_server: EmbeddedRedis, partitions: int, how: str
) -> None:
    pond = own_pond
    pond.redis.config_set("appendfsync", "always")
    async with pond.working("lookup", "llm"), pond.client() as client:
        prompts = [f"{PROMPT} ({n})" for n in range(8)]
        for _ in range(2):  # in L2, then in L1
            await answers([client.ask(prompt, tags=["doc:1"]) for prompt in prompts])
        await client.invalidate(tags=["doc:1"])
        if how == "sigkill":
            own_server.kill()
        own_server.restart()
        found = await answers([client.ask(prompt, tags=["doc:1"]) for prompt in prompts])
        await pond.settled()
    assert [reply.tier for reply in found] == ["llm"] * 8
    assert pond.calls() == 16


async def test_workers_and_clients_wait_out_a_server_that_is_gone_for_a_while(
    own_pond: Pond, own_server: EmbeddedRedis
) -> None:
    pond = own_pond
    longest = max(pond.options["lookup_lease"], pond.options["llm_lease"])
    async with (
        Proxy.to(pond.url) as lookup,
        Proxy.to(pond.url) as llm,
        Proxy.to(pond.url) as asking,
        pond.working("lookup", url=lookup.url),
        pond.working("llm", url=llm.url),
        pond.client(asking.url) as client,
    ):
        await client.ask(PROMPT)
        own_server.kill()
        gone = time.monotonic()
        asked = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(10)]
        await turned_away(3, lookup, llm, asking)
        await until(lambda: time.monotonic() - gone > longest, "every lease has run out")
        assert not any(one.done() for one in asked)
        own_server.restart()
        await answers(asked)
        await pond.settled()
    assert pond.calls() == 11


async def test_workers_started_before_their_server_begin_when_it_comes(
    own_pond: Pond, own_server: EmbeddedRedis
) -> None:
    pond = own_pond
    own_server.kill()
    async with (
        Proxy.to(pond.url) as before_lookup,
        Proxy.to(pond.url) as before_llm,
        pond.process("lookup", url=before_lookup.url, ready=False) as lookup,
        pond.process("llm", url=before_llm.url, ready=False) as llm,
    ):
        await turned_away(3, before_lookup, before_llm)
        assert not any(line.get("event") == "ready" for line in lookup.lines + llm.lines)
        own_server.restart()
        async with pond.client() as client:
            assert (await client.ask(PROMPT)).tier == "llm"
            assert await asyncio.to_thread(lookup.terminate) == 0
            assert await asyncio.to_thread(llm.terminate) == 0


async def test_everyone_is_answered_when_the_server_forgets_everything(pond: Pond, partitions: int) -> None:
    pond.options |= {"concurrency": 8}
    async with pond.working("lookup", "llm"), pond.client() as client, pond.client() as other:
        clients = [client, other]
        asked = await in_every_stage(
            pond, lambda prompt: asyncio.create_task(clients[len(prompt) % 2].ask(prompt, timeout=20))
        )
        pond.redis.flushall()
        await answers(asked)
        await pond.settled()
        assert (await client.ask(f"{PROMPT} (0)")).tier in ("l1", "l2")
        assert pond.redis.hget("mp:deployment", "partitions") == str(partitions).encode()
    assert pond.calls() <= 60 + 8


async def test_what_was_flushed_is_never_served_again(pond: Pond, partitions: int) -> None:
    raw = Raw(pond)
    async with pond.working("lookup", "llm"):
        for n in range(5):
            for m in range(3):  # computed, in L2, in L1
                raw.publish(f"{n}.{m}", PROMPT)
                await raw.answered(f"{n}.{m}")
            pond.redis.flushall()
            raw = Raw(pond)
            raw.publish(f"{n}.flushed", PROMPT)
            assert (await raw.answered(f"{n}.flushed"))["tier"] == "llm"
            pond.redis.flushall()
            raw = Raw(pond)
        await until(lambda: pond.redis.exists("mp:deployment"), "the deployment is recorded anew")
    assert pond.calls() == 10


async def test_a_client_whose_new_channel_was_made_on_a_connection_that_broke_asks_again(pond: Pond) -> None:
    """The server forgot the client and its request; the new channel's creation runs, and its reply is lost."""
    async with Proxy.to(pond.url) as proxy, pond.client(proxy.url) as client:
        asked = asyncio.create_task(client.ask(PROMPT))
        await until(lambda: pond.length("requests") == 1, "the request is accepted")
        proxy.cut_after(lambda data: b"XADD" in data and b"mp:reply:" in data)
        pond.redis.flushall()
        await until(lambda: proxy.cuts == 1, "the channel is made anew")
        async with pond.working("lookup", "llm"):
            await answers([asked], timeout=10)
            await pond.settled()


async def test_lost_scripts_cost_nobody_an_answer_and_no_second_call(pond: Pond, partitions: int) -> None:
    pond.options |= {"llm_lease": 5.0, "lookup_lease": 5.0}
    async with pond.working("lookup", "llm"), pond.client() as client:
        asked = []
        for n in range(8):
            asked += [asyncio.create_task(client.ask(f"{PROMPT} ({n}, {m % 5})", tags=["doc:1"])) for m in range(10)]
            await called_more_than(pond, 4 * n)
            pond.redis.script_flush()
        await answers(asked)
        await pond.settled()
        assert pond.calls() == 40
        pond.redis.script_flush()
        await client.invalidate(tags=["doc:1"])
        assert (await client.ask(f"{PROMPT} (0, 0)", tags=["doc:1"])).tier == "llm"
        await pond.settled()


async def test_a_server_out_of_memory_delays_an_answer_and_costs_no_second_call(
    own_pond: Pond, partitions: int
) -> None:
    pond = own_pond
    async with (
        pond.working("lookup"),
        pond.process("llm", simulated_first_token=0.5) as worker,
        pond.client() as client,
    ):
        asked = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(3)]
        await until(lambda: pond.calls() == 3, "the calls are in progress")
        pond.redis.config_set("maxmemory", 1)
        await until(lambda: "OOM" in worker.errors, "it cannot tell its waiters")
        pond.redis.config_set("maxmemory", 0)
        await answers(asked)
        await pond.settled()
    assert pond.calls() == 3


async def test_a_flushed_server_does_not_bring_back_what_a_computation_began_before(pond: Pond) -> None:
    """The provider's answer comes after the flush: its fill is gone, so nothing of it may be written."""
    raw = Raw(pond)
    async with pond.working("lookup"), pond.process("llm", simulated_first_token=1.0) as worker:
        raw.publish("r1", PROMPT)
        await until(lambda: pond.calls() == 1, "the call is in progress")
        pond.redis.flushall()
        await until(lambda: "nothing written" in worker.errors or "lost the lease" in worker.errors, "it learns of it")
        assert not pond.found("*:entry:*")
        assert not pond.found("*:outcome:*")
    assert pond.calls() == 1
