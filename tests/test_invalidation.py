"""Once `invalidate` has returned, nobody who asks afterwards gets what is older, from any tier or computation."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest

from producers.client import Client
from producers.invalidation import Invalidation
from producers.reply import Reply
from shared.errors import InvalidRequest, Unavailable
from tests import faults_support
from tests.databases import Database
from tests.faults_support import Pond, answers, until

pond = faults_support.pond
FAST: dict[str, Any] = {"simulated_first_token": 0.0}
CACHED = ("l1", "l2")
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "tagged": {"tags": ["doc:1", "user:7"]},
    "of a tenant": {"tenant": "acme"},
    "of a profile": {"profile": "market"},
    "of a model": {"model": "gpt-4o"},
}


async def ask_all(client: Client) -> dict[str, Reply]:
    return {name: await client.ask(f"a question {name}", **how) for name, how in ASKED.items()}


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        ({"tags": ["doc:1"]}, {"tagged"}),
        ({"tags": "doc:1"}, {"tagged"}),
        ({"tags": ["doc:2", "user:7"]}, {"tagged"}),
        ({"tags": ["doc:2"]}, set()),
        ({"tenant": "acme"}, {"of a tenant"}),
        ({"tenant": "default"}, set(ASKED) - {"of a tenant"}),
        ({"profile": "market"}, {"of a profile"}),
        ({"model": "gpt-4o"}, {"of a model"}),
        ({"model": "gpt-4o", "profile": "market"}, {"of a model", "of a profile"}),
        ({"prefix": "doc:"}, {"tagged"}),
        ({"prefix": "tenant:a"}, {"of a tenant"}),
        ({"prefix": "doc:11"}, set()),
        ({"everything": True}, set(ASKED)),
    ],
)
async def test_exactly_what_is_named_is_forgotten(
    pond: Pond, partitions: int, what: dict[str, Any], gone: set[str]
) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await ask_all(client)
        held = await ask_all(client)
        assert {reply.tier in CACHED for reply in held.values()} == {True}
        ids = await client.invalidate(**what)
        after = await ask_all(client)
    assert sorted(ids) == list(range(partitions))
    assert {name for name, reply in after.items() if reply.tier == "llm"} == gone


async def test_one_key_is_forgotten(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        one, other = await client.ask("one"), await client.ask("other")
        await client.invalidate(key=one.key)
        assert (await client.ask("one")).tier == "llm"
        assert (await client.ask("other")).key == other.key
    assert pond.calls() == 3


async def test_a_request_brings_tags_that_the_entry_lacks(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await client.ask("q", tags=["a"])
        await client.ask("q", tags=["a"])
        await client.invalidate(tags=["b"])
        assert (await client.ask("q", tags=["a"])).tier in CACHED
        assert (await client.ask("q", tags=["b"])).tier == "llm"
        assert (await client.ask("q", tags=["a"])).tier in CACHED
    assert pond.calls() == 2


async def test_the_tags_of_who_joined_count(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm", simulated_first_token=0.4), pond.client() as client:
        first = asyncio.ensure_future(client.ask("q", tags=["a"]))
        await until(lambda: pond.calls() == 1, "the provider is called")
        second = asyncio.ensure_future(client.ask("q", tags=["b"]))
        await answers([first, second])
        assert pond.calls() == 1
        await client.invalidate(tags=["b"])
        assert (await client.ask("q", tags=["a"])).tier == "llm"


async def test_a_flight_that_was_overtaken_answers_who_asked_before_and_nobody_else(
    pond: Pond, partitions: int
) -> None:
    async with pond.working("lookup", "llm", simulated_first_token=0.6), pond.client() as client:
        before = asyncio.ensure_future(client.ask("q", tags=["a"]))
        await until(lambda: pond.calls() == 1, "the provider is called")
        await client.invalidate(tags=["a"])
        after = asyncio.ensure_future(client.ask("q", tags=["a"]))
        await until(lambda: pond.calls() == 2, "the provider is called again")
        old, new = await answers([before, after])
        held = await client.ask("q", tags=["a"])
    assert (old.stored, old.detail) == (False, "overtaken")
    assert (new.stored, new.collapsed) == (True, False)
    assert held.tier in CACHED


async def test_an_overtaken_answer_is_not_stored(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm", simulated_first_token=0.4), pond.client() as client:
        asked = asyncio.ensure_future(client.ask("q", tags=["a"]))
        await until(lambda: pond.calls() == 1, "the provider is called")
        await client.invalidate(tags=["a"])
        reply = await asked
        assert (reply.stored, reply.detail, reply.ttl) == (False, "invalidated", 0)
        assert not pond.found("{mp:*}:entry:*")


async def test_every_worker_forgets_at_once(pond: Pond, partitions: int) -> None:
    workers = ["lookup"] * 3
    async with pond.working(*workers, "llm", **FAST), pond.client() as client, pond.client() as other:
        for _ in range(20):
            await client.ask("q", tags=["a"])
            held = await answers([client.ask("q") for _ in range(12)])
            assert {reply.tier for reply in held} <= set(CACHED)
            began = time.monotonic()
            await other.invalidate(tags=["a"])
            after = await answers([client.ask("q", tags=["a"]) for _ in range(12)])
            assert max(reply.age for reply in after) <= time.monotonic() - began + 0.001
            assert sum(reply.tier == "llm" and not reply.collapsed for reply in after) == 1


async def test_no_answer_is_older_than_an_invalidation_its_asker_came_after(
    pond: Pond, partitions: int, rng: random.Random
) -> None:
    """Askers and an invalidator at full speed; the answer's own number says when its computation began."""
    versions = {"a": 0, "b": 0}
    async with pond.working("lookup", "lookup", "llm", simulated_first_token=0.003), pond.client() as client:

        async def invalidate() -> None:
            for _ in range(60):
                tag = rng.choice(["a", "b"])
                await client.invalidate(tags=[tag])
                versions[tag] += 1
                await asyncio.sleep(rng.random() * 0.01)

        async def ask(tag: str) -> None:
            while not done.is_set():
                known = versions[tag]
                reply = await client.ask(f"about {tag}", tags=[tag])
                if reply.tier in CACHED and known:
                    after = pond.redis.time()
                    stored_at = after[0] + after[1] / 1e6 - reply.age  # at the latest
                    assert stored_at >= invalidated_at[tag][known] - 0.002, f"older than invalidation {known} of {tag}"

        invalidated_at: dict[str, list[float]] = {"a": [0.0], "b": [0.0]}
        done = asyncio.Event()
        recorded = client.invalidate

        async def timed(**what: Any) -> Invalidation:
            ids = await recorded(**what)
            newest = min(int(at.split("-")[0]) for at in ids.values()) / 1000
            invalidated_at[what["tags"][0]].append(newest)
            return ids

        client.invalidate = timed  # type: ignore[method-assign]
        askers = [asyncio.create_task(ask(tag)) for tag in "ab" * 4]
        try:
            await invalidate()
        finally:
            done.set()
        await asyncio.gather(*askers)
        await pond.settled()


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ({}, "tags"),
        ({"tags": []}, "tags"),
        ({"tags": ["a b"]}, "tags"),
        ({"tags": ["all"]}, "tags"),
        ({"key": "a b"}, "key"),
        ({"tenant": ""}, "tenant"),
        ({"model": 7}, "model"),
        ({"prefix": "a b"}, "prefix"),
        ({"tags": ["prefix:a"]}, "tags"),
        ({"everything": True, "by": "land"}, "by"),
        ({"everything": True, "reason": "x" * 501}, "reason"),
        ({"everything": True, "wait": -1}, "wait"),
    ],
)
async def test_what_cannot_be_invalidated_is_named(pond: Pond, what: dict[str, Any], field: str) -> None:
    async with pond.client() as client:
        with pytest.raises(InvalidRequest) as refusal:
            await client.invalidate(**what)
    assert refusal.value.field == field


async def test_a_tag_that_cannot_be_written_is_refused(pond: Pond) -> None:
    async with pond.client() as client:
        with pytest.raises(InvalidRequest):
            await client.invalidate(tags=["\ud800"])
        assert await client.invalidate(tags=["é"])


async def test_an_invalidation_that_reaches_nobody_says_so(own_server: Any) -> None:
    async with Client(own_server.url) as client:
        own_server.stop()
        with pytest.raises(Unavailable, match="again"):
            await client.invalidate(everything=True)


async def test_a_trimmed_log_costs_an_l1_but_no_coherence(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client(invalidation_limit=100) as client:
        await client.ask("q", tags=["a"])
        assert (await client.ask("q")).tier in CACHED
        for n in range(250):
            await client.invalidate(tags=[f"t{n}"])
        assert pond.length("invalidations") < 250
        assert (await client.ask("q")).tier == "l2"
        await client.invalidate(tags=["a"])
        assert (await client.ask("q")).tier == "llm"


async def test_a_model_declared_anew_is_asked_anew_at_once(pond: Pond, partitions: int, database: Database) -> None:
    pond.options |= FAST | {"database_url": database.url}
    async with pond.working("lookup", "llm", "persistence"), pond.client() as client:
        old = await client.ask("q", model="m-1")
        other = await client.ask("q", model="m-2")
        assert (await client.ask("q", model="m-1")).tier in CACHED
        await until(lambda: not pond.length("landed"), "both are persisted")
    pond.options |= {"model_versions": {"m-1": "2026-11"}}
    async with pond.working("lookup", "llm", "persistence"), pond.client() as client:
        new = await client.ask("q", model="m-1")
        assert (new.tier, new.key == old.key) == ("llm", False)
        assert (await client.ask("q", model="m-1")).tier in CACHED
        again = await client.ask("q", model="m-2")
        assert (again.tier in CACHED, again.key) == (True, other.key)
        # An old worker that still runs answers from what it knows; whatever either stored goes by the model's name.
        await until(lambda: not pond.length("landed"), "the new one is persisted")
        async with pond.working("invalidation"):
            gone = await client.invalidate(model="m-1", wait=20.0)
    assert gone.l3 == 2
    assert [row["model"] for row in await database.fetch("SELECT model FROM answers")] == ["m-2"]
