"""Soft and hard expiry: stale answers are served while one refresh runs, hot ones are refreshed before they expire."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from producers.reply import Reply
from shared.envelope import opened
from shared.keys import PartitionKeys
from shared.profiles import Profile
from tests import faults_support
from tests.faults_support import Pond, answers, until

pond = faults_support.pond
Q = "What is the weather?"
FAST: dict[str, Any] = {"simulated_first_token": 0.02}


def stale(reply: Reply) -> bool:
    """Whether the reply says that it is stale."""
    return bool(orjson.loads(reply._raw).get("stale", False))


def profiles(**fields: Any) -> dict[str, Any]:
    """Return the settings of a deployment whose default profile is this."""
    return FAST | {"profiles": {"response": Profile(**({"early_refresh": 0} | fields))}}


async def test_a_stale_answer_is_served_at_once_while_one_refresh_runs(pond: Pond, partitions: int) -> None:
    changes = profiles(ttl=0.3, stale_while_revalidate=60) | {"simulated_first_token": 0.5}
    async with (
        pond.working("lookup", "llm", **changes),
        pond.working("lookup", **changes),
        pond.client() as client,
    ):
        first = await client.ask(Q)
        async with asyncio.timeout(10):
            while not stale(again := await client.ask(Q)):
                assert pond.calls() == 1
        crowd = await answers([client.ask(Q) for _ in range(50)])
        assert {reply.key for reply in crowd} == {first.key}
        assert all(stale(reply) and reply.ttl == 0 and reply.tier in ("l1", "l2") for reply in [again, *crowd])
        async with asyncio.timeout(10):
            while stale(fresh := await client.ask(Q)):
                assert pond.calls() <= 2
        assert fresh.tier in ("l1", "l2") and fresh.ttl > 0
        assert pond.calls() == 2
        assert pond.stat("refreshes") in (0, 1)  # added up once a second


async def test_past_the_hard_expiry_nothing_is_served(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **profiles(ttl=0.05, stale_while_revalidate=0.1)), pond.client() as client:
        first = await client.ask(Q)
        name = pond.names(Q).entry(first.key)
        await until(lambda: not pond.redis.exists(name), "the entry is gone")
        assert (await client.ask(Q)).tier == "llm"


async def test_a_hot_answer_is_refreshed_before_it_expires(pond: Pond) -> None:
    changes = profiles(ttl=30, early_refresh=100) | {"simulated_first_token": 0.3}
    async with pond.working("lookup", "llm", **changes), pond.client() as client:
        await client.ask(Q)
        async with asyncio.timeout(20):
            while pond.calls() == 1:
                reply = await client.ask(Q)
                assert reply.ttl > 0 and not stale(reply)


async def test_without_early_refresh_a_fresh_answer_is_left_alone(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **profiles(ttl=30, early_refresh=0)), pond.client() as client:
        await client.ask(Q)
        await answers([client.ask(Q) for _ in range(300)])
        await pond.settled()
    assert pond.calls() == 1


async def test_who_asks_for_what_is_about_to_be_refreshed_does_not_wait_behind_other_refreshes(pond: Pond) -> None:
    changes = profiles(ttl=0.05, stale_while_revalidate=60)
    async with pond.client() as client:
        async with pond.working("lookup", "llm", **changes):
            await client.ask(Q)
        async with pond.working("lookup", **changes):
            async with asyncio.timeout(10):
                while not stale(await client.ask(Q)):
                    pass
            await until(lambda: pond.length("refreshes") == 1, "a refresh is asked for")
            waiting = asyncio.create_task(client.ask(Q, mode="refresh"))
            await until(lambda: pond.length("fills") == 1, "the refresh becomes a fill")
            assert pond.length("refreshes") == 0
            async with pond.working("llm", **changes):
                assert not (await waiting).collapsed, "the call is made for it: nobody had taken the refresh up"
    assert pond.calls() == 2


async def test_a_refreshed_answer_replaces_the_one_in_l1_though_l2_had_lost_it(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **profiles(ttl=60)), pond.client() as client:
        await client.ask(Q)
        assert {(await client.ask(Q)).tier, (await client.ask(Q)).tier} <= {"l1", "l2"}
        pond.redis.delete(pond.names(Q).entry(pond.key(Q)))
        assert (await client.ask(Q)).tier == "l1"
        new = await client.ask(Q, mode="refresh")
        again = await client.ask(Q)
        assert again.age <= new.age + 5 and again.tier == "l2", "the old one is served"


async def test_only_if_cached_takes_a_stale_answer_and_causes_no_call(pond: Pond) -> None:
    changes = profiles(ttl=0.05, stale_while_revalidate=60)
    async with pond.working("lookup", "llm", **changes), pond.client() as client:
        await client.ask(Q)
        async with asyncio.timeout(10):
            while not stale(await client.ask(Q, mode="only-if-cached")):
                pass
        await answers([client.ask(Q, mode="only-if-cached") for _ in range(20)])
        await pond.settled()
    assert pond.calls() == 1


async def test_hits_are_reported_per_key_and_per_kind(pond: Pond) -> None:
    for k in pond.all_names():
        pond.redis.xgroup_create(k.touches, "promotion", "0", mkstream=True)
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        key = (await client.ask(Q)).key
        raw = faults_support.Raw(pond)
        for n in range(7):
            raw.publish(f"r{n}", Q, cache=b'{"experiment":"tone","variant":"warm"}')
        await until(lambda: all(raw.replies(f"r{n}") for n in range(7)), "all are answered")
        await answers([client.ask(Q) for _ in range(5)])
    reports = [orjson.loads(fields[b"data"]) for _, fields in pond.redis.xrange(pond.names(Q).touches)]
    assert sum(sum(report["keys"].get(key, [0])) for report in reports) == 12
    hits: dict[Any, int] = {}
    for report in reports:
        for tier, profile, tenant, model, experiment, variant, count, *rest in report["stats"]:
            if tier in ("l1", "l2"):
                assert (profile, tenant, model) == ("response", "default", "gpt-4o-mini")
                assert sum(rest[-1]) == count
                assert rest[1] > 0, "what a hit saved is counted"
                hits[experiment, variant] = hits.get((experiment, variant), 0) + count
    assert hits == {("tone", "warm"): 7, (None, None): 5}


# who computes is an application


LED = orjson.dumps({"profile": "retrieval", "lead": True})
ARGS = orjson.dumps({"input": "where is it?"})


class Led:
    """Requests of applications that compute for themselves, as they look on the wire."""

    def __init__(self, pond: Pond) -> None:
        self.raw = faults_support.Raw(pond)
        self.pond = pond

    def publish(self, request_id: str, **fields: Any) -> None:
        """Ask."""
        self.raw.publish(request_id, Q, partition=0, body=ARGS, **({"cache": LED} | fields))

    async def lead(self, request_id: str, count: int = 1) -> dict[str, Any]:
        """Return what the `count`th reply says of the computation to lead."""
        await until(lambda: len(self.raw.replies(request_id)) >= count, f"{count} replies to {request_id}")
        found: dict[str, Any] = self.raw.replies(request_id)[count - 1]["lead"]
        return found


async def test_one_of_those_who_ask_computes_and_another_when_it_falls_silent(pond: Pond) -> None:
    led = Led(pond)
    async with pond.working("lookup", compute_lease=60.0):
        led.publish("a")
        first = await led.lead("a")
        led.publish("b")
        await until(lambda: pond.stat("collapsed") == 1, "the other one waits")
        led.publish("a")  # its answer was lost on the way: it asks again
        assert (await led.lead("a", 2))["token"] == first["token"]
        k = PartitionKeys(first["partition"])
        assert (first["lease"], first["ttl_ms"], first["model"]) == (60.0, 86_400_000, "gpt-4o-mini")
        assert first["tags"] == ["profile:retrieval", "tenant:default", "model:gpt-4o-mini"]
        assert 50_000 < pond.redis.pttl(k.flight(first["key"])) <= 60_000, "no waiter keeps a silent leader's flight"
        assert led.raw.replies("b") == []
        pond.redis.delete(k.flight(first["key"]))  # the lease runs out
        led.publish("b")
        second = await led.lead("b")
        assert second["token"] != first["token"]
        assert pond.redis.lrange(k.waiters(first["key"], second["token"]), 0, -1) == []
        pond.redis.delete(k.flight(first["key"]))


async def test_who_computes_needs_a_reply_channel(pond: Pond) -> None:
    led = Led(pond)
    async with pond.working("lookup"):
        led.publish("a", reply=None)
        await until(lambda: pond.length("dead") == 1, "it is a dead letter")


# what has just failed


async def test_a_key_that_has_just_failed_is_not_computed_again_until_its_time_is_up(pond: Pond) -> None:
    failed = pond.names(Q).failed(pond.key(Q))
    error = orjson.dumps({"code": "provider_error", "message": "it is down"})
    raw = faults_support.Raw(pond)
    async with pond.working("lookup", "llm", **FAST):
        pond.redis.set(failed, b"99999999999999 1\n" + error, px=60_000)
        raw.publish("a", Q)
        assert (await raw.answered("a"))["error"]["message"] == "it is down"
        raw.publish("b", Q, cache=b'{"mode":"refresh"}')
        assert (await raw.answered("b"))["tier"] == "llm"
        assert not pond.redis.exists(failed), "an answer ends it"
        pond.redis.set(failed, b"1 1\n" + error, px=60_000)
        raw.publish("c", Q, cache=b'{"tags":["x"]}')
        assert (await raw.answered("c"))["tier"] in ("l1", "l2", "llm")


async def test_what_is_kept_for_errors_answers_while_the_provider_is_known_to_fail(pond: Pond) -> None:
    changes = profiles(ttl=0.05, stale_if_error=60)
    raw = faults_support.Raw(pond)
    async with pond.working("lookup", "llm", **changes), pond.client() as client:
        await client.ask(Q)
        async with asyncio.timeout(10):
            while (await client.ask(Q)).tier != "llm":
                pass
        await until(lambda: pond.redis.exists(pond.names(Q).entry(pond.key(Q))), "it is kept")
    async with pond.working("lookup", **changes):
        pond.redis.set(pond.names(Q).failed(pond.key(Q)), b'99999999999999 1\n{"code":"provider_error"}', px=60_000)

        for n in range(100):  # as long as it is fresh
            if (reply := await ask(raw, f"r{n}")).get("degraded"):
                break
    assert (reply["stale"], reply["degraded"], reply["tier"]) == (True, True, "l2")


async def ask(raw: faults_support.Raw, request_id: str) -> dict[str, Any]:
    """Ask, and return the reply's payload."""
    raw.publish(request_id, Q)
    return await raw.answered(request_id)


async def test_a_refreshed_answer_keeps_the_tags_of_the_one_it_replaces(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **profiles(ttl=0.3, stale_while_revalidate=60)), pond.client() as client:
        await client.ask(Q, tags=["doc:1"])
        async with asyncio.timeout(10):
            while not stale(await client.ask(Q)):
                pass
            while stale(await client.ask(Q)):
                pass
        assert pond.calls() == 2
        await client.invalidate(tags=["doc:1"])
        assert (await client.ask(Q)).tier == "llm"


async def test_a_stale_answer_in_l1_goes_once_a_newer_one_is_stored_though_l2_had_lost_it(pond: Pond) -> None:
    name = pond.names(Q).entry(pond.key(Q))
    async with pond.working("lookup", "llm", **profiles(ttl=60, stale_while_revalidate=60)), pond.client() as client:
        await client.ask(Q, ttl=1)
        assert not stale(await client.ask(Q)), "L1 holds it"
        first = opened(pond.redis.getdel(name))
        assert (await client.ask(Q, tags=["x"])).tier == "llm"  # L1 cannot answer for this tag
        await pond.past(first.created_ms + first.ttl_ms)  # the first is stale now, its successor is not
        assert not stale(await client.ask(Q))
    assert pond.calls() == 2


async def test_who_may_not_refresh_hides_nobody_who_may(pond: Pond) -> None:
    pond.options |= {"profiles": {"response": {"ttl": 1.0, "stale_while_revalidate": 600, "early_refresh": 0.0}}}
    async with pond.client() as client, pond.working("lookup"):
        async with pond.working("llm"):
            await client.ask(Q)
            await pond.settled()
        assert [(await client.ask(Q)).tier for _ in range(2)] == ["l2", "l1"]
        await pond.aged()
        # In one turn of the loop, so in one batch.
        found = await answers([client.ask(Q, mode="only-if-cached"), client.ask(Q)])
        assert [(reply.tier, reply.stale) for reply in found] == [("l1", True)] * 2
        await until(lambda: pond.length("refreshes") == 1, "its refresh is asked for")
        async with pond.working("llm"):
            await pond.settled()
