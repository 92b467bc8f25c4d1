"""What the modes, ages, lifetimes, tenants and the quality gate do to an answer, seen by the client."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from producers.client import Client
from producers.reply import Reply
from shared.errors import NotCached
from shared.keys import PartitionKeys, partition_of
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, outcomes, until

pond = faults_support.pond
FAST: dict[str, Any] = {"simulated_first_token": 0.0}
Q = "What turns the wheel?"
CACHED = ("l1", "l2")


async def ask(client: Client, prompt: str = Q, **how: Any) -> tuple[bool, bool]:
    """Ask; return whether the answer came from the cache, and whether it is stored now."""
    reply = await client.ask(prompt, **how)
    return reply.tier in CACHED, reply.stored


async def test_default_reads_and_stores(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        assert [await ask(client), await ask(client)] == [(False, True), (True, True)]


async def test_refresh_computes_again_and_everyone_gets_the_new_answer(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "lookup", "llm", **FAST), pond.client() as client:
        old = await client.ask(Q)
        for _ in range(8):  # both workers hold it in L1
            await client.ask(Q)
        new = await client.ask(Q, mode="refresh", ttl=50)
        later = [await client.ask(Q) for _ in range(8)]
    assert (old.tier, new.tier, pond.calls()) == ("llm", "llm", 2)
    assert all(reply.tier in CACHED and reply.ttl <= 50 for reply in later)


async def test_only_if_cached_never_computes(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        with pytest.raises(NotCached):
            await client.ask(Q, mode="only-if-cached")
        assert pond.calls() == 0
        await client.ask(Q)
        assert await ask(client, mode="only-if-cached") == (True, True)


async def test_no_store_reads_and_does_not_store(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        first = await client.ask(Q, mode="no-store")
        assert (first.stored, first.detail, first.ttl) == (False, "no-store", 0)
        assert await ask(client) == (False, True)
        assert await ask(client, mode="no-store") == (True, True)
    assert pond.calls() == 2


async def test_two_clients_that_number_their_requests_alike_bypass_each_other(pond: Pond) -> None:
    clients = [Raw(pond, "one"), Raw(pond, "two")]
    for raw in clients:
        raw.publish("1", Q, cache=b'{"mode":"bypass"}')
    async with pond.working("lookup", "llm", **FAST):
        assert [(await raw.answered("1"))["collapsed"] for raw in clients] == [False, False]
        await pond.settled()
    assert pond.calls() == 2


async def test_bypass_neither_reads_nor_stores_nor_joins(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await client.ask(Q)
        found = await answers([client.ask(Q, mode="bypass") for _ in range(5)])
        await pond.settled()
    assert pond.calls() == 6
    assert not any(reply.stored or reply.collapsed or reply.tier != "llm" for reply in found)


async def test_a_no_store_request_may_share_the_flight_of_one_that_stores(pond: Pond) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        found = await answers([client.ask(Q, mode="no-store"), client.ask(Q)])
        assert await ask(client) == (True, True)
    assert {reply.detail for reply in found} == {"stored"}
    assert pond.calls() == 1


async def test_the_switch_turns_all_caching_off(pond: Pond) -> None:
    async with pond.working("lookup", "llm", cache_enabled=True, **FAST), pond.client() as client:
        await client.ask(Q)
    async with pond.working("lookup", "llm", cache_enabled=False, **FAST), pond.client() as client:
        assert [await ask(client), await ask(client)] == [(False, False), (False, False)]
    assert pond.calls() == 3


async def test_an_answer_ends_with_its_ttl_in_every_tier(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        first = await client.ask(Q, ttl=0.25, profile="chat")
        again = await client.ask(Q, profile="chat")
        assert (again.tier in CACHED, 0 < again.ttl <= 0.25) == (True, True)
        name = PartitionKeys(partition_of(first.key, pond.partitions)).entry(first.key)
        await until(lambda: not pond.redis.exists(name), "the entry expires")
        assert (await client.ask(Q, profile="chat")).tier == "llm"


async def test_a_profile_s_ttl_holds_without_another(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        assert (await client.ask(Q, profile="chat")).ttl == 1800
        assert (await client.ask(Q)).ttl == 86400


async def test_max_age_passes_over_what_is_older(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await client.ask(Q)
        await pond.aged(0.01)
        assert await ask(client, max_age=60) == (True, True)
        assert await ask(client, max_age=0.01) == (False, True)
        fresh = await client.ask(Q)
    assert fresh.tier in CACHED
    assert pond.calls() == 2


async def test_tenants_profiles_models_and_scopes_never_share_an_answer(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        found = [
            await client.ask(Q),
            await client.ask(Q, tenant="acme"),
            await client.ask(Q, profile="market"),
            await client.ask(Q, model="gpt-4o"),
            await client.ask(Q, profile="context", scope={"user": "ann"}),
            await client.ask(Q, profile="context", scope={"user": "bob"}),
        ]
        again = await client.ask(Q, tenant="acme")
    assert [reply.tier for reply in found] == ["llm"] * 6
    assert len({reply.key for reply in found}) == 6
    assert (again.tier in CACHED, again.key) == (True, found[1].key)


@pytest.mark.parametrize(("fields", "detail"), [({"max_tokens": 3}, "length"), ({"stop": "the"}, None)])
async def test_a_cut_answer_is_delivered_and_not_stored(pond: Pond, fields: dict[str, Any], detail: str | None) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        reply = await client.ask(Q, **fields)
        again = await client.ask(Q, **fields)
    assert (again.tier == "llm") == (detail is not None)
    if detail:
        assert reply.text
        assert (reply.stored, reply.detail, reply.ttl) == (False, detail, 0)
        assert reply.cache_status.endswith(f"detail={detail}")


async def test_an_unreadable_entry_is_a_miss_deleted_and_counted(pond: Pond) -> None:
    async with pond.working("llm", **FAST), pond.client() as client:
        async with pond.working("lookup"):
            key = (await client.ask(Q)).key
        name = pond.names(Q).entry(key)
        head, _, _ = pond.redis.get(name).partition(b'{"model"')
        for junk in (b"mp0 nonsense", head + b"no meta\nno body"):
            pond.redis.set(name, junk, px=60_000)
            async with pond.working("lookup"):
                assert await ask(client) == (False, True)
                assert await ask(client) == (True, True)
    assert pond.stat("unreadable") == 2
    assert pond.calls() == 3


async def test_an_absurd_deadline_harms_nobody(pond: Pond, partitions: int) -> None:
    raw = Raw(pond)
    for n, deadline in enumerate([b"9" * 30, b"9" * 18, b"-5", b"0", b"soon", b"1.5"]):
        raw.publish(f"odd{n}", f"odd {n}", deadline=deadline)
    raw.publish("plain", Q)
    async with pond.working("lookup", "llm", **FAST):
        told = [await raw.answered(f"odd{n}") for n in range(6)]
        assert (await raw.answered("plain"))["tier"] == "llm"
        await pond.settled()
    assert [reply.get("error", {}).get("code") for reply in told] == [
        None, None, "deadline_exceeded", "deadline_exceeded", "invalid_request", "invalid_request",
    ]  # fmt: skip
    assert pond.length("dead") == 0


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"body": None}, "body"),
        ({"deadline": None}, "deadline"),
        ({"body": b"\xff"}, "body"),
        ({"body": b"[" * 1000 + b"]" * 1000}, "body"),
        ({"body": b'{"input":"x","context_ids":[' + b"[" * 500 + b"]" * 500 + b"]}"}, "body"),
        ({"cache": b"{"}, "cache"),
        ({"cache": b'{"tll":1}'}, "tll"),
        ({"cache": b'{"tags":' + b"[" * 900 + b"]" * 900 + b"}"}, "tags"),
    ],
)
async def test_a_malformed_message_is_told_so_and_harms_nobody(pond: Pond, fields: dict[str, Any], field: str) -> None:
    raw = Raw(pond)
    raw.publish("bad", "x", **fields)
    raw.publish("plain", Q)
    async with pond.working("lookup", "llm", **FAST):
        error = (await raw.answered("bad"))["error"]
        assert (error["code"], error["field"]) == ("invalid_request", field)
        assert (await raw.answered("plain"))["tier"] == "llm"
        await pond.settled()
    assert pond.length("dead") == 0


async def test_a_malformed_message_without_a_reply_channel_is_a_dead_letter(pond: Pond) -> None:
    raw = Raw(pond)
    raw.publish("bad", "x", body=b"{", reply=None)
    async with pond.working("lookup"):
        await until(lambda: pond.length("dead") == 1, "the dead letter lies there")
        await pond.settled()


async def test_a_request_nobody_waits_for_fills_the_cache(pond: Pond) -> None:
    raw = Raw(pond)
    raw.publish("warm", Q, reply=None)
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await until(lambda: pond.redis.exists(pond.names(Q).entry(pond.key(Q))), "the answer is stored")
        assert await ask(client) == (True, True)
    assert raw.replies() == []


async def test_a_misrouted_request_is_handed_over_and_coalesced(pond: Pond, partitions: int) -> None:
    raw = Raw(pond)
    for at in range(partitions):
        raw.publish(f"r{at}", Q, partition=at)
    async with pond.working("lookup", "llm"):
        told = [await raw.answered(f"r{at}") for at in range(partitions)]
        await pond.settled()
    assert pond.calls() == 1
    home = PartitionKeys(partition_of(pond.key(Q), partitions))
    assert pond.found("{mp:*}:entry:*") == [home.entry(pond.key(Q)).encode()]
    assert len({orjson.dumps(reply["body"]) for reply in told}) == 1


async def test_many_kinds_of_requests_at_once_each_get_their_own(pond: Pond, partitions: int) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"mode": "refresh"}, {"mode": "no-store"}, {"mode": "bypass"}, {"tenant": "a"}, {"ttl": 9}, {"tags": ["x"]},
    ]  # fmt: skip
    async with pond.working("lookup", "lookup", "llm", "llm"), pond.client() as client:
        found = await outcomes([client.ask(f"q{n % 5}", **kinds[n % 7]) for n in range(350)])
        await pond.settled()
    replies = [reply for reply in found if isinstance(reply, Reply)]
    assert len(replies) == 350
    shared = {(n % 5, n % 7 == 4) for n in range(350)}
    assert pond.calls() == len(shared) + sum(n % 7 == 3 for n in range(350))
