"""Clients, their connections and their requests go wrong: exactly one visible outcome each, and nobody else suffers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from producers.client import Client
from producers.reply import Reply
from shared import keys
from shared.errors import DeadlineExceeded, Overloaded, ProviderError, Unavailable
from shared.scripts import SCRIPTS
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, outcomes, until
from tests.proxy import Proxy

pond = faults_support.pond

PROMPT = "What is a tail race?"


def running(script: str) -> Callable[[bytes], bool]:
    """Return a predicate: this data calls the script."""
    sha = SCRIPTS[script].sha.encode()
    return lambda data: sha in data


@asynccontextmanager
async def behind(pond: Pond, proxy: Proxy, who: str) -> AsyncIterator[Client]:
    """Run a lookup worker, an LLM worker and a client; `who` of them is connected through the proxy."""
    url = {who: proxy.url}
    async with (
        pond.working("lookup", url=url.get("lookup")),
        pond.working("llm", url=url.get("llm")),
        pond.client(url.get("client")) as client,
    ):
        yield client


# connections that are cut


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(
    ("who", "script"),
    [
        ("client", "publish"),
        ("lookup", "join"),
        ("lookup", "fetch"),
        ("llm", "land"),
        ("llm", "reply"),
        ("llm", "clear"),
    ],
)
async def test_a_cut_around_any_step_of_a_miss_leaves_one_answer_and_one_call(
    pond: Pond, who: str, script: str, side: str
) -> None:
    async with Proxy.to(pond.url) as proxy, behind(pond, proxy, who) as client:
        (proxy.cut_after if side == "after" else proxy.cut_before)(running(script))
        first = await client.ask(PROMPT)
        await until(lambda: proxy.cuts == 1, "the cut happened")
        again = await client.ask(PROMPT)
        await pond.settled()
    assert (first.tier, again.tier) in {("llm", "l1"), ("llm", "l2"), ("l2", "l1")}
    assert first.stored, "what is said twice is said the same"
    assert pond.calls() == 1


@pytest.mark.parametrize("script", ["reply", "retire"])
async def test_a_cut_after_a_hit_was_served_leaves_one_answer(pond: Pond, script: str) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("llm"),
        pond.working("lookup", url=proxy.url),
        pond.client() as client,
    ):
        await client.ask(PROMPT)
        proxy.cut_after(running(script))
        found = await answers([client.ask(PROMPT) for _ in range(20)])
        await until(lambda: proxy.cuts == 1, "the cut happened")
        found.append(await client.ask(PROMPT))
        await pond.settled()
    assert {reply.tier for reply in found} <= {"l1", "l2"}
    assert pond.calls() == 1


@pytest.mark.parametrize("who", ["lookup", "llm", "client"])
async def test_messages_delivered_on_a_connection_that_is_cut_are_not_lost(pond: Pond, who: str) -> None:
    """The read that blocks is answered, and its answer is lost on the way."""
    pond.options |= {"lookup_lease": 8.0, "llm_lease": 8.0}
    async with Proxy.to(pond.url) as proxy, behind(pond, proxy, who) as client:
        proxy.cut_after(lambda data: b"XREAD" in data)
        await until(lambda: proxy.cuts == 1, "a read blocks that will be cut")
        async with asyncio.timeout(6):  # well before the lease: a worker takes up its own again
            await client.ask(PROMPT)
        await pond.settled()
    assert pond.calls() == 1


async def one_more(count: Callable[[], int]) -> None:
    """Wait until there is one more than there is now."""
    before = count()
    await until(lambda: count() > before, "one more")


async def test_every_connection_cut_again_and_again_costs_nobody_an_answer(pond: Pond, partitions: int) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup", "llm", url=proxy.url),
        pond.client(proxy.url) as client,
    ):
        asked = []
        for n in range(12):
            asked += [asyncio.create_task(client.ask(f"{PROMPT} ({n}, {m % 6})")) for m in range(12)]
            # A question is being computed; or all were cut off the last time, and the first is connected again.
            await one_more(pond.calls if n % 2 == 0 else lambda: proxy.connections)
            await proxy.cut()
        await answers(asked)
        await pond.settled()
    assert pond.calls() <= 72 + pond.stat("leases_lost")


async def test_an_invalidation_cut_after_it_ran_still_returns_and_counts(pond: Pond, partitions: int) -> None:
    async with Proxy.to(pond.url) as proxy, pond.working("lookup", "llm"), pond.client(proxy.url) as client:
        await client.ask(PROMPT, tags=["doc:1"])
        proxy.cut_after(running("invalidate"))
        ids = await client.invalidate(tags=["doc:1"])
        assert proxy.cuts == 1
        assert sorted(ids) == list(range(partitions))
        assert (await client.ask(PROMPT, tags=["doc:1"])).tier == "llm"
        await pond.settled()
    assert pond.calls() == 2


async def test_a_server_out_of_reach_ends_each_ask_at_its_own_deadline_and_no_later(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy, pond.working("lookup", "llm"), pond.client(proxy.url) as client:
        await client.ask(PROMPT)
        proxy.refuse = True
        await proxy.cut()
        began = asyncio.get_running_loop().time()
        found = await outcomes([client.ask(PROMPT, timeout=0.3), client.ask(PROMPT, timeout=0.6)])
        assert [type(one) for one in found] == [DeadlineExceeded] * 2
        assert asyncio.get_running_loop().time() - began < 0.9
        with pytest.raises(Unavailable):
            await client.invalidate(everything=True)
        proxy.refuse = False
        assert (await client.ask(PROMPT)).tier in ("l1", "l2")


# leaders that leave


LEAVING: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "is cancelled": ({}, asyncio.CancelledError),
    "runs out of time": ({"timeout": 0.3}, DeadlineExceeded),
    "closes its client": ({}, Unavailable),
}


@pytest.mark.parametrize("how", LEAVING)
async def test_a_waiter_outlives_its_leader_that(pond: Pond, partitions: int, how: str) -> None:
    directives, expected = LEAVING[how]
    async with pond.working("lookup", "llm", simulated_first_token=0.8), pond.client() as follower:
        async with pond.client() as client:
            leader = asyncio.create_task(client.ask(PROMPT, **directives))
            await until(lambda: pond.calls() == 1, "the call is in progress")
            waiting = asyncio.create_task(follower.ask(PROMPT))
            await until(lambda: pond.stat("requests") == 2 or pond.length("requests") == 0, "the follower is aboard")
            if how == "is cancelled":
                leader.cancel()
            elif how == "runs out of time":
                await outcomes([leader])
        (left,) = await outcomes([leader])
        assert isinstance(left, expected)
        found = await waiting
        await pond.settled()
    assert found.text
    assert pond.calls() == 1


async def test_a_follower_that_leaves_does_not_disturb_its_leader(pond: Pond) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        leader = asyncio.create_task(client.ask(PROMPT))
        followers = [asyncio.create_task(client.ask(PROMPT)) for _ in range(3)]
        await until(lambda: pond.calls() == 1, "the call is in progress")
        for follower in followers[:2]:
            follower.cancel()
        found = await answers([leader, followers[2]])
        await pond.settled()
    assert [reply.text for reply in found] == [found[0].text] * 2


async def test_a_providers_error_reaches_every_waiter_typed_and_nothing_is_stored(pond: Pond, partitions: int) -> None:
    pond.options |= {"attempts": 2, "backoff_initial": 0.0, "profiles": {"response": {"negative_ttl": 0.0}}}
    async with pond.working("lookup"), pond.client() as one, pond.client() as other:
        async with pond.working("llm", simulated_failure_rate=1.0):
            found = await outcomes([asyncio.create_task(client.ask(PROMPT)) for client in (one, one, other, other)])
        assert [(type(error), getattr(error, "status", None)) for error in found] == [(ProviderError, 503)] * 4
        assert pond.calls() == 2
        async with pond.working("llm"):
            assert (await one.ask(PROMPT)).tier == "llm"
            await pond.settled()


# clients that do not read


async def test_replies_to_a_client_that_does_not_read_are_bounded_and_expire(pond: Pond) -> None:
    pond.options |= {"reply_limit": 20}
    slow = Raw(pond, "slow", ttl_ms=2500)
    async with pond.working("lookup", "llm"), pond.client() as client:
        await client.ask(PROMPT)
        for n in range(500):
            slow.publish(f"r{n}", PROMPT)
            if n % 2:
                await client.ask(PROMPT)
        await pond.settled()
        assert pond.redis.xlen(slow.channel) < 20 + 200  # the server trims by whole nodes of 100
        await until(lambda: not pond.redis.exists(slow.channel), "the channel expires")
        slow.publish("late", PROMPT)
        assert (await client.ask(PROMPT)).tier == "l1"
        await pond.settled()
        assert not pond.redis.exists(slow.channel), "a reply must not make a channel anew"
    assert pond.calls() == 1


async def test_a_client_that_is_gone_costs_nothing_and_disturbs_nobody(pond: Pond, partitions: int) -> None:
    ghost = Raw(pond, "ghost")
    pond.redis.delete(ghost.channel)
    async with pond.working("lookup", "llm"), pond.client() as client:
        for n in range(10):
            ghost.publish(f"r{n}", f"{PROMPT} ({n % 5})")
        await answers([client.ask(f"{PROMPT} ({n})") for n in range(5)])
        await pond.settled()
        assert not pond.redis.exists(ghost.channel)
    assert pond.calls() == 5


async def test_a_reply_channel_that_is_no_stream_disturbs_nobody(pond: Pond) -> None:
    pond.redis.set(keys.reply("odd"), "mine", ex=60)
    odd = Raw.__new__(Raw)
    odd.pond, odd.name, odd.channel = pond, "odd", keys.reply("odd")
    async with pond.working("lookup", "llm"), pond.client() as client:
        for n in range(5):
            odd.publish(f"r{n}", f"{PROMPT} ({n})")
        await answers([client.ask(f"{PROMPT} ({n})") for n in range(5)])
        odd.publish("again", f"{PROMPT} (0)")
        assert (await client.ask(f"{PROMPT} (0)")).tier == "l1"
        await pond.settled()
    assert pond.calls() == 5
    assert pond.redis.get(keys.reply("odd")) == b"mine"


# channels that somebody else touches


async def test_a_client_whose_channel_somebody_overwrote_makes_it_anew(pond: Pond) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        (channel,) = pond.found("mp:reply:*")
        pond.redis.set(channel, "mine", px=50_000)
        await until(lambda: pond.redis.pttl(channel) > 50_000, "the client looked after it, and failed to read")
        pond.redis.delete(channel)
        await answers([client.ask(PROMPT)], timeout=10)
        await pond.settled()


async def test_a_strangers_reply_on_its_channel_does_not_stop_a_client(pond: Pond) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        (channel,) = pond.found("mp:reply:*")
        pond.redis.xadd(channel, {b"\xff": b"\xff", "somebody-1": "{", "": "", "a b": "c"})
        await answers([client.ask(PROMPT)])
        await pond.settled()


# queues that are full


async def test_requests_beyond_the_limit_are_refused_at_once_and_the_accepted_ones_answered(pond: Pond) -> None:
    pond.options |= {"request_limit": 5}
    async with pond.client() as client:
        asked = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(20)]
        await until(lambda: sum(one.done() for one in asked) == 15, "those beyond the limit are refused")
        assert pond.length("requests") == 5
        async with pond.working("lookup", "llm"):
            found = await outcomes(asked)
            await pond.settled()
    refused = [one for one in found if isinstance(one, Overloaded)]
    assert len(refused) == 15
    assert all(error.retry_after and error.retry_after > 0 for error in refused)
    assert sum(isinstance(one, Reply) for one in found) == 5
    assert pond.calls() == 5


async def test_misses_beyond_the_fill_limit_are_refused_and_the_accepted_ones_answered(pond: Pond) -> None:
    pond.options |= {"fill_limit": 3}
    async with pond.working("lookup"), pond.client() as client:
        asked = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(10)]
        await until(lambda: sum(one.done() for one in asked) == 7, "those beyond the limit are refused")
        joining = asyncio.create_task(client.ask(f"{PROMPT} (0)"))  # aboard a flight that exists there is room
        await until(lambda: pond.length("requests") == 0, "it is aboard")
        async with pond.working("llm"):
            found = await outcomes([*asked, joining])
            await pond.settled()
    assert [type(one) for one in found] == [Reply] * 3 + [Overloaded] * 7 + [Reply]
    assert pond.calls() == 3
