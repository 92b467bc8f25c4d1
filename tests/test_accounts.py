"""A small history, known by hand, driven through the real workers: the report must say exactly that."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from producers.client import Client
from shared.errors import ProviderError
from tests import faults_support
from tests.databases import Database
from tests.faults_support import Pond, outcomes, until
from tests.outages import Outage
from tests.persistence_support import is_written
from workers.report import Report, Window, collect
from workers.report_table import notes

pond = faults_support.pond

PROMPT = "What is a mill race?"
#: a dollar per token
PRICES = {"prices": {"m": {"input": 1e6, "output": 1e6}}, "model": "m", "attempts": 1}
WORKERS = ("lookup", "llm", "persistence")


@pytest.fixture(autouse=True)
def priced(pond: Pond) -> None:
    pond.options |= PRICES


async def reported(pond: Pond, database: Database) -> Report:
    """Wait until all is written, and return the report of it."""
    await pond.settled()
    await until(lambda: is_written(pond), "everything is written")
    connection = await database.connect()
    try:
        return await collect(connection, Window.of("2h", None, datetime.now(UTC)), ("experiment",), 10)
    finally:
        await connection.close()


async def told_singly(pond: Pond, hits: int) -> None:
    """Wait until so many hits of keys were reported, each in a message of its own."""

    def reported() -> list[int]:
        found = [fields[b"data"] for k in pond.all_names() for _, fields in pond.redis.xrange(k.touches)]
        return [count for data in found if (count := sum(map(sum, orjson.loads(data)["keys"].values())))]

    await until(lambda: reported() == [1] * hits, f"{hits} hits are reported one by one")


async def ask(client: Client, **changes: Any) -> int:
    """Ask the one question; return the tokens, and so the dollars, that its answer took."""
    reply = await client.ask(PROMPT, **changes)
    return int(reply.body["usage"]["total_tokens"])


async def test_every_dollar_of_a_known_history(pond: Pond, database: Database) -> None:
    async with pond.working(*WORKERS), pond.client() as client:
        cost = (await asyncio.gather(*(ask(client) for _ in range(3))))[0]
        for _ in range(4):
            await ask(client)
        await ask(client, mode="bypass")
        await ask(client, mode="refresh")
        await ask(client)
        await pond.settled()
    async with pond.working("persistence"):
        found = (await reported(pond, database)).total
    assert found.tiers.get("llm") == 3 and found.tiers.get("collapsed") == 2
    assert found.hits == 5 and found.requests == 10
    assert (found.calls, found.failed_calls, found.background_calls) == (3, 0, 0)
    assert found.spent == pytest.approx(3 * cost)
    assert found.saved == pytest.approx(7 * cost)
    assert found.saved_coalesced == pytest.approx(2 * cost)
    assert found.without_cache == pytest.approx(10 * cost)
    assert found.spent_prompt_tokens + found.spent_completion_tokens == 3 * cost


async def test_a_simulated_endpoint_counts_as_one_whatever_its_name(pond: Pond, database: Database) -> None:
    away = {"base_url": "http://127.0.0.1:1/v1", "api_key": "k"}
    pond.options |= {
        "providers": {"away": away, "cheap": {"kind": "simulated"}},
        "profiles": {"response": {"providers": ["away", "cheap:m"]}},
    }
    async with pond.working(*WORKERS), pond.client() as client:
        assert (await client.ask(PROMPT)).provider == "cheap:m"
        await client.ask(PROMPT, mode="refresh")
        await ask(client)
        await pond.settled()
    async with pond.working("persistence"):
        found = await reported(pond, database)
    assert (found.total.calls, found.total.simulated_calls) == (4, 2)
    assert found.providers == {"away": 2, "simulated/cheap:m": 2}
    assert any("The simulated provider answered 2 of 4 calls" in note for note in notes(found))


async def test_a_key_asked_for_once_a_second_is_among_the_most_asked(pond: Pond, database: Database) -> None:
    async with pond.working(*WORKERS), pond.client() as client:
        await ask(client)
        for hits in range(3):
            await ask(client)
            await told_singly(pond, hits + 1)
            await until(lambda: is_written(pond), "it is written")
    async with pond.working("persistence"):
        found = await reported(pond, database)
    assert [(key.hits, key.simulated) for key in found.top] == [(3, True)]


async def test_who_failed_was_not_answered(pond: Pond, database: Database) -> None:
    Outage(pond).begin()
    async with pond.working(*WORKERS), pond.client() as client:
        found = await outcomes([asyncio.ensure_future(client.ask(PROMPT)) for _ in range(3)])
    assert {type(one) for one in found} == {ProviderError}
    async with pond.working("persistence"):
        total = (await reported(pond, database)).total
    assert (total.requests, total.calls, total.failed_calls) == (0, 1, 1)


async def test_answers_kept_for_errors_are_counted_when_no_flight_is_begun(pond: Pond, database: Database) -> None:
    kept = {
        "ttl": 0.1,
        "stale_while_revalidate": 0.0,
        "stale_if_error": 60.0,
        "early_refresh": 0.0,
        "negative_ttl": 30.0,
    }
    pond.options |= {"profiles": {"response": kept}}
    outage = Outage(pond)
    async with pond.working(*WORKERS), pond.client() as client:
        cost = await ask(client)
        await pond.aged()
        outage.begin()
        told = [await client.ask(PROMPT) for _ in range(4)]
        assert {one.degraded for one in told} == {True}
    async with pond.working("persistence"):
        total = (await reported(pond, database)).total
    assert total.tiers == {"llm": 1, "stale": 4}
    assert total.saved == pytest.approx(4 * cost)


async def test_experiments_with_a_variant_of_the_same_name_are_told_apart(pond: Pond, database: Database) -> None:
    async with pond.working(*WORKERS), pond.client() as client:
        await ask(client)
        await asyncio.gather(*(ask(client, experiment=f"e{n % 2}", variant="control") for n in range(10)))
    async with pond.working("persistence"):
        found = await reported(pond, database)
    assert {(one.experiment, one.requests) for one in found.variants} == {("e0", 5), ("e1", 5)}


async def test_who_joined_counts_under_his_own_variant(pond: Pond, database: Database) -> None:
    async with pond.working(*WORKERS), pond.client() as client:
        await asyncio.gather(*(ask(client, experiment="e", variant=f"v{n % 2}") for n in range(10)))
    async with pond.working("persistence"):
        found = await reported(pond, database)
    assert {(one.variant, one.requests) for one in found.variants} == {("v0", 5), ("v1", 5)}


async def test_a_refresh_that_somebody_waits_for_before_it_is_taken_up_saves_him_nothing(
    pond: Pond, database: Database
) -> None:
    kept = {"ttl": 0.1, "stale_while_revalidate": 0.5, "early_refresh": 0.0}
    pond.options |= {"profiles": {"response": kept}}
    async with pond.client() as client:
        async with pond.working(*WORKERS):
            cost = await ask(client)
            await pond.settled()
        async with pond.working("lookup", "persistence"):
            await pond.aged()
            assert (await client.ask(PROMPT)).stale
            await until(lambda: pond.length("refreshes"), "its refresh waits")
            await until(lambda: not pond.found("{mp:*}:entry:*"), "it may be served no longer")
            waits = asyncio.create_task(ask(client))
            await until(lambda: pond.length("fills"), "it is a fill now")
            async with pond.working("llm"):
                await waits
    async with pond.working("persistence"):
        total = (await reported(pond, database)).total
    assert (total.requests, total.hits, total.calls) == (3, 1, 2)
    assert total.spent == pytest.approx(2 * cost)
    assert total.saved == pytest.approx(cost)
    assert total.without_cache == pytest.approx(3 * cost)


async def test_the_longest_names_cost_nobody_his_figures(pond: Pond, database: Database) -> None:
    noise = random.Random(7)
    long = ["".join(chr(noise.randrange(0x20000, 0x2A000)) for _ in range(200)) for _ in range(4)]
    names = dict(zip(("tenant", "experiment", "variant", "model"), long, strict=True))
    async with pond.working(*WORKERS), pond.client() as client:
        await asyncio.gather(ask(client), ask(client, **names))
    async with pond.working("persistence"):
        assert (await reported(pond, database)).total.requests == 2
    assert pond.length("dead") == 0
