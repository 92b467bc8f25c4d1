"""The stampede once more, but the LLM worker that computes its answer is SIGKILLed in the middle of the call."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson

from producers.bench import questions, stampede
from producers.bench.measure import Show
from producers.bench.stage import Child, Stage
from shared.errors import Unavailable
from shared.keys import PartitionKeys
from shared.link import Link
from shared.messages import Rules, understand
from shared.providers.simulated import calls

LEASE = 2.0
#: The share of all requests that must be aboard when the worker dies, unless the call is about to end.
_ABOARD = 0.95


async def run(
    stage: Stage, show: Show, *, rounds: int = 5, requests: int = 10_000, producers: int = 4
) -> dict[str, Any]:
    """Measure on `stage` with two lookup and two LLM workers; after each round the dead one is replaced."""
    show("failover: starting", 0.0)
    journal = stage.journal()
    for _ in range(2):
        await stage.worker("lookup")
    pool = [await stampede.llm_worker(stage, journal, llm_lease=LEASE) for _ in range(2)]
    crowd = [await stage.child("flood") for _ in range(producers)]
    asked = questions.distinct(rounds)
    found = []
    link = Link(stage.url, name="millpond-bench")
    try:
        for number in range(rounds):
            show(f"failover: round {number + 1} of {rounds}", (number + 0.5) / (rounds + 0.5))
            murder = partial(_kill_the_leader, stage, link, pool, journal, len(calls(journal)), requests)
            found.append(await stampede.flood(crowd, asked[number], requests, journal, murder))
            pool = [child for child in pool if child.alive]
            if number + 1 < rounds:
                pool.append(await stampede.llm_worker(stage, journal, llm_lease=LEASE))
    finally:
        await link.close()
    killed_with = min(one["aboard_at_death"] for one in found)
    return stampede.worst(found, requests, producers) | {"aboard_at_death": killed_with, "lease_s": LEASE}


async def _kill_the_leader(
    stage: Stage, link: Link, pool: list[Child], journal: Path, before: int, requests: int, messages: questions.Messages
) -> dict[str, Any]:
    """Wait until the provider was called and the requests are aboard; kill the worker that called it."""
    limit = perf_counter() + 30
    while len(begun := calls(journal)) <= before:
        if perf_counter() > limit:
            raise Unavailable("no provider call began within 30 s of the first request")
        await asyncio.sleep(0.005)
    last_moment = perf_counter() + stampede.FIRST_TOKEN * 0.75
    settings = stage.settings()
    body = orjson.dumps({"model": settings.model, "messages": messages})
    key, k = understand(body, None, Rules.of(settings)).key, PartitionKeys(0)
    aboard = 0
    while aboard < requests * _ABOARD and perf_counter() < last_moment:
        await asyncio.sleep(0.02)
        token = await link.call(("HGET", k.flight(key), "token"))
        aboard = await link.call(("LLEN", k.waiters(key, token.decode()))) if token else 0
    leader = next(child for child in pool if child.pid == begun[before]["pid"])
    leader.kill()
    return {"aboard_at_death": aboard}
