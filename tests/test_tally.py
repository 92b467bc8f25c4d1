"""What flights count as in the statistics: each request once, with what it saved."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace
from typing import Any

import orjson
import pytest

from shared.entry import unpack
from shared.errors import ProviderError
from shared.keys import PROMOTION_GROUP
from shared.messages import Kind
from shared.touches import Touches
from tests import faults_support
from tests.faults_support import Pond, outcomes
from tests.outages import Outage
from tests.persistence_support import entry_of

pond = faults_support.pond

PROMPT = "What is a mill race?"


@pytest.fixture
def counted(pond: Pond) -> Pond:
    """A deployment in which somebody reads the touches, and whose answers cost a dollar per token."""
    for names in pond.all_names():
        pond.redis.xgroup_create(names.touches, PROMOTION_GROUP, "0", mkstream=True)
    pond.options |= {"prices": {"m": {"input": 1e6, "output": 1e6}}, "simulated_first_token": 0.3, "attempts": 1}
    return pond


def sums(pond: Pond) -> dict[str, dict[str, Any]]:
    """Return what was reported, by tier, of the tiers that flights report."""
    found: defaultdict[str, dict[str, Any]] = defaultdict(lambda: {"hits": 0, "tokens": 0, "cost": 0.0, "ms": 0})
    for names in pond.all_names():
        for _, fields in pond.redis.xrange(names.touches):
            for tier, _, _, model, _, _, hits, prompt, completion, cost, ms, histogram in orjson.loads(fields[b"data"])[
                "stats"
            ]:
                if tier in ("llm", "collapsed", "stale"):
                    assert (model, sum(histogram)) == ("m", hits)
                    total = found[tier]
                    total["hits"] += hits
                    total["tokens"] += prompt + completion
                    total["cost"] += cost
                    total["ms"] += ms
    return dict(found)


async def test_who_joined_saved_what_the_answer_took_and_who_began_saved_nothing(counted: Pond) -> None:
    async with counted.working("lookup", "llm"), counted.client() as client:
        replies = await asyncio.gather(*(client.ask(PROMPT, model="m") for _ in range(5)))
    usage = replies[0].body["usage"]["total_tokens"]
    found = sums(counted)
    assert found["llm"] == {"hits": 1, "tokens": 0, "cost": 0.0, "ms": 0}
    assert (found["collapsed"]["hits"], found["collapsed"]["tokens"]) == (4, 4 * usage)
    assert found["collapsed"]["cost"] == pytest.approx(4 * usage)
    assert 4 * 300 <= found["collapsed"]["ms"] < 4 * 2000


async def test_who_was_aboard_a_failed_flight_was_not_answered(counted: Pond) -> None:
    Outage(counted).begin()
    async with counted.working("lookup", "llm"), counted.client() as client:
        found = await outcomes([asyncio.ensure_future(client.ask(PROMPT, model="m")) for _ in range(3)])
    assert {type(one) for one in found} == {ProviderError}
    assert sums(counted) == {}


async def test_who_got_a_stored_answer_instead_is_counted_once_and_as_that(counted: Pond) -> None:
    kept = {"ttl": 0.1, "stale_if_error": 60.0, "soft_timeout": 0.1, "early_refresh": 0.0}
    counted.options |= {"profiles": {"response": kept}}
    async with counted.working("lookup", "llm"), counted.client() as client:
        first = await client.ask(PROMPT, model="m")
        await counted.aged()
        strict = asyncio.create_task(client.ask(PROMPT, model="m", mode="refresh"))
        told = await asyncio.gather(*(client.ask(PROMPT, model="m") for _ in range(3)))
        await strict
        await counted.settled()
    assert {one.degraded for one in told} == {True}
    found, usage = sums(counted), first.body["usage"]["total_tokens"]
    assert (found["stale"]["hits"], found["stale"]["tokens"]) == (3, 3 * usage)
    # The first of all, and the refresh: whether it began the second flight or joined it.
    assert found["llm"]["hits"] + found.get("collapsed", {"hits": 0})["hits"] == 2


def test_what_hits_saved_is_what_the_answer_of_each_took() -> None:
    touches, kind = Touches("touches", 100), Kind("response", "default", "m")
    stored = unpack("k", entry_of())
    answers = [replace(stored, tokens=(n, 0), cost=float(n), compute_ms=n) for n in (1, 100)]
    for entry in (*answers, answers[0]):  # of one key: one takes the place of the other between two reports
        touches.hit("l1", kind, entry, 2, 0)
    ((*_, told),) = touches.report(now=True)
    ((_, _, _, _, _, _, hits, prompt, _, cost, ms, _),) = orjson.loads(told)["stats"]
    assert (hits, prompt, cost, ms) == (6, 204, 204.0, 204)
    assert orjson.loads(told)["keys"] == {"k": [6, 0, 0]}
    assert not touches.report(now=True)
