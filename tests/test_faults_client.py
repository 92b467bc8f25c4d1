"""Clients, their connections and their requests go wrong: exactly one visible outcome each, and nobody else suffers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from producers.reply import Reply
from shared import keys
from shared.errors import DeadlineExceeded, Overloaded, ProviderError, Unavailable
from shared.keys import PartitionKeys
from shared.scripts import SCRIPTS
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, body_of, outcomes, until
from tests.proxy import Proxy

pond = faults_support.pond

PROMPT = "What is a tail race?"


def running(script: str) -> Callable[[bytes], bool]:
    """Return a predicate: this data calls the script."""
    sha = SCRIPTS[script].sha.encode()
    return lambda data: sha in data


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
    async with Proxy.to(pond.url) as proxy:
        url = {who: proxy.url}
        async with (
            pond.working("lookup", url=url.get("lookup")),
            pond.working("llm", url=url.get("llm")),
            pond.client(url.get("client")) as client,
        ):
            (proxy.cut_after if side == "after" else proxy.cut_before)(running(script))
            first = await client.ask(PROMPT)
            await until(lambda: proxy.cuts == 1, "the cut happened")
            again = await client.ask(PROMPT)
            await pond.settled()
    assert (first.tier, again.tier) in {("llm", "l1"), ("llm", "l2"), ("l2", "l1")}
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
    async with Proxy.to(pond.url) as proxy:
        url = {who: proxy.url}
        async with (
            pond.working("lookup", url=url.get("lookup")),
            pond.working("llm", url=url.get("llm")),
            pond.client(url.get("client")) as client,
        ):
            proxy.cut_after(lambda data: b"XREAD" in data)
            await until(lambda: proxy.cuts == 1, "a read blocks that will be cut")
            async with asyncio.timeout(6):  # well before the lease: a worker takes up its own again
                await client.ask(PROMPT)
            await pond.settled()
    assert pond.calls() == 1


async def test_every_connection_cut_again_and_again_costs_nobody_an_answer(pond: Pond, partitions: int) -> None:
    async with (
        Proxy.to(pond.url) as proxy,
        pond.working("lookup", "llm", url=proxy.url),
        pond.client(proxy.url) as client,
    ):
        asked = []
        for n in range(12):
            asked += [asyncio.create_task(client.ask(f"{PROMPT} ({n}, {m % 6})")) for m in range(12)]
            await asyncio.sleep(0.03)
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
    pond.options |= {"attempts": 2, "backoff_initial": 0.0}
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


# requests in the wrong partition


async def test_a_misrouted_request_is_answered_and_joins_the_rightly_routed_one(pond: Pond) -> None:
    pond = Pond(pond.url, pond.redis, pond.options | {"partitions": 4})
    raw, right = Raw(pond), pond.names(PROMPT).partition
    async with pond.working("lookup", "llm"):
        for n in range(8):
            raw.publish(f"r{n}", PROMPT, partition=n % 4)
        found = [await raw.answered(f"r{n}") for n in range(8)]
        await pond.settled()
    assert {(reply["tier"], reply["body"]["id"]) for reply in found} == {("llm", found[0]["body"]["id"])}
    assert pond.calls() == 1
    assert len(raw.replies()) == len({reply["collapsed"] for reply in found})  # one entry tells all who joined
    assert pond.redis.exists(PartitionKeys(right).entry(pond.key(PROMPT)))


async def test_a_misrouted_request_is_never_answered_from_before_an_invalidation(pond: Pond) -> None:
    pond = Pond(pond.url, pond.redis, pond.options | {"partitions": 4})
    raw = Raw(pond)
    async with pond.working("lookup", "llm"), pond.client() as client:
        for n in range(8):
            raw.publish(f"warm{n}", PROMPT, partition=n % 4)
            await raw.answered(f"warm{n}")
            await client.invalidate(everything=True)
            raw.publish(f"r{n}", PROMPT, partition=n % 4)
            assert (await raw.answered(f"r{n}"))["tier"] == "llm"
            await client.invalidate(key=pond.key(PROMPT))
        await pond.settled()
    assert pond.calls() == 16


# malformed messages


GOOD = body_of(PROMPT)
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "no body": ({"body": None}, "body"),
    "no deadline": ({"deadline": None}, "deadline"),
    "a deadline that is no number": ({"deadline": "soon"}, "deadline"),
    "a deadline of 5000 digits": ({"deadline": "9" * 5000}, "deadline"),
    "a body that is not JSON": ({"body": b"{"}, "body"),
    "a body that is not UTF-8": ({"body": b'{"messages":"\xff"}'}, "body"),
    "a body that is a list": ({"body": b"[]"}, "body"),
    "an empty body": ({"body": b""}, "body"),
    "a body nested without end": ({"body": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"}, "body"),
    "a body that is too long": ({"body": b'{"messages":"' + b"x" * (1 << 20) + b'"}'}, "body"),
    "half a surrogate pair": ({"body": b'{"messages":[{"role":"user","content":"\\ud800"}]}'}, "body"),
    "messages that are no list": ({"body": b'{"messages":7}'}, "messages"),
    "a model that is no text": ({"body": b'{"model":[],"messages":[{"role":"user","content":"x"}]}'}, "model"),
    "directives that are not JSON": ({"cache": b"\x00"}, "cache"),
    "an unknown directive": ({"cache": b'{"colour":1}'}, "colour"),
    "an unknown profile": ({"cache": b'{"profile":"nope"}'}, "profile"),
    "an unknown mode": ({"cache": b'{"mode":["default"]}'}, "mode"),
    "a tag with a line break": ({"cache": b'{"tags":["a\\nb"]}'}, "tags"),
    "a TTL without end": ({"cache": b'{"ttl":1e300}'}, "ttl"),
}
BURIED: dict[str, dict[str, Any]] = {
    "no field we know": {"id": None, "reply": None, "deadline": None, "body": None, "x": "y"},
    "no id": {"id": None},
    "an id with a space": {"id": "a b"},
    "no reply channel and no JSON": {"reply": None, "body": b"{"},
    "a reply channel that is not UTF-8": {"reply": b"\xff"},
    "a reply channel with a space": {"reply": "a b"},
}


@pytest.mark.parametrize("how", TOLD)
async def test_a_malformed_request_is_told_what_is_wrong_with(pond: Pond, how: str) -> None:
    fields, field = TOLD[how]
    raw = Raw(pond)
    await _among_good_ones(pond, raw, fields)
    (reply,) = raw.replies("bad")
    assert (reply["error"]["code"], reply["error"]["field"]) == ("invalid_request", field)
    assert reply["error"]["message"]
    assert pond.length("dead") == 0


@pytest.mark.parametrize("how", BURIED)
async def test_a_malformed_request_that_cannot_be_told_is_a_dead_letter_with(pond: Pond, how: str) -> None:
    raw = Raw(pond)
    await _among_good_ones(pond, raw, BURIED[how])
    ((_, letter),) = pond.redis.xrange(PartitionKeys(0).dead)
    assert letter[b"reason"]
    assert letter[b"deliveries"] == b"1"


async def _among_good_ones(pond: Pond, raw: Raw, fields: dict[str, Any]) -> None:
    """Publish it between two good requests, all of them delivered in one batch; the good ones are answered."""
    raw.publish("before", PROMPT)
    raw.publish("bad", PROMPT, **fields)
    raw.publish("after", PROMPT)
    async with pond.working("lookup", "llm", simulated_first_token=0.0):
        assert (await raw.answered("before"))["tier"] == "llm"
        assert (await raw.answered("after"))["tier"] == "llm"
        await pond.settled()
    assert pond.calls() == 1


async def test_a_deadline_past_all_calendars_is_answered_and_leaves_nothing_for_ever(pond: Pond) -> None:
    raw = Raw(pond)
    async with pond.working("lookup", "llm"):
        raw.publish("r1", PROMPT, deadline="9" * 30)
        await until(lambda: pond.length("fills"), "the flight has begun")
        lives = [pond.redis.pttl(name) for part in ("flight", "waiters") for name in pond.redis.keys(f"*:{part}:*")]
        assert all(0 < life < 2 * 3600_000 for life in lives), lives
        assert (await raw.answered("r1"))["tier"] == "llm"
        await pond.settled()


async def test_a_client_whose_channel_somebody_overwrote_makes_it_anew(pond: Pond) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        (channel,) = pond.redis.keys("mp:reply:*")
        pond.redis.set(channel, "mine", px=50_000)
        await until(lambda: pond.redis.pttl(channel) > 50_000, "the client looked after it, and failed to read")
        pond.redis.delete(channel)
        await answers([client.ask(PROMPT)], timeout=10)
        await pond.settled()


async def test_a_strangers_reply_on_its_channel_does_not_stop_a_client(pond: Pond) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        (channel,) = pond.redis.keys("mp:reply:*")
        pond.redis.xadd(channel, {b"\xff": b"\xff", "somebody-1": "{", "": "", "a b": "c"})
        await answers([client.ask(PROMPT)])
        await pond.settled()


FILLS: dict[str, dict[str, Any]] = {
    "nothing": {"x": "y"},
    "a spec that is not JSON": {"key": "k", "token": "t", "epoch": "0-0", "body": GOOD, "spec": "{"},
    "a spec that lacks its parts": {"key": "k", "token": "t", "epoch": "0-0", "body": GOOD, "spec": "{}"},
    "a key that is not UTF-8": {"key": b"\xff", "token": "t", "epoch": "0-0", "body": GOOD, "spec": "{}"},
}


@pytest.mark.parametrize("how", FILLS)
async def test_a_malformed_fill_is_a_dead_letter_with(pond: Pond, how: str) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        pond.redis.xadd(PartitionKeys(0).fills, FILLS[how])
        await client.ask(PROMPT)
        await pond.settled()
    ((_, letter),) = pond.redis.xrange(PartitionKeys(0).dead)
    assert b"not a fill" in letter[b"reason"]
    assert pond.calls() == 1


async def test_an_unreadable_entry_is_a_miss(pond: Pond) -> None:
    name = PartitionKeys(0).entry(pond.key(PROMPT))
    async with pond.working("lookup", "llm"), pond.client() as client:
        for junk in (b"junk", b"mp1 0-0 1 99999999999999 0\nnot JSON\nbody", b"mp9 0-0 1 2 0\n{}\n", b""):
            pond.redis.set(name, junk, ex=60)
            assert (await client.ask(PROMPT)).tier == "llm"
            await client.invalidate(everything=True)
        await pond.settled()
    assert pond.calls() == 4
