"""The pool's rate limits, on real servers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.errors import Unavailable
from shared.providers.limits import Place, RateLimits, estimate_tokens
from shared.settings import load
from tests.conftest import Server
from tests.faults_support import until


@asynccontextmanager
async def pool_of(server: Server, workers: int, *, period: int = 60, **limits: int) -> AsyncIterator[list[RateLimits]]:
    """As many workers as asked that share their limits; they leave nothing but windows that expire."""
    pool = [RateLimits(load(**limits), server.url, period=period) for _ in range(workers)]
    try:
        yield pool
    finally:
        for worker in pool:
            await worker.close()
    with server.connect() as connection:
        assert all(key.startswith(b"mp:limit:") for key in connection.scan_iter())


async def admitted(worker: RateLimits, tokens: int = 1) -> None:
    await asyncio.wait_for(worker.acquire(tokens), 20)


async def is_full(worker: RateLimits, tokens: int = 1) -> bool:
    try:
        await asyncio.wait_for(worker.acquire(tokens), 0.1)
    except TimeoutError:
        return True
    return False


async def test_a_pool_shares_its_requests_per_minute(server: Server) -> None:
    async with pool_of(server, 2, requests_per_minute=4) as pool:
        for worker in pool * 2:
            await admitted(worker)
        for worker in pool:
            assert await is_full(worker)


async def test_a_pool_shares_its_tokens_per_minute(server: Server) -> None:
    async with pool_of(server, 2, tokens_per_minute=100) as (one, other):
        await admitted(one, 60)
        assert await is_full(other, 60)
        await admitted(other, 40)


async def test_a_call_larger_than_the_window_takes_a_whole_window(server: Server) -> None:
    async with pool_of(server, 1, tokens_per_minute=100) as (worker,):
        await admitted(worker, 5000)
        assert await is_full(worker)


async def test_whoever_waits_is_admitted_as_the_window_moves(server: Server) -> None:
    async with pool_of(server, 2, period=1, requests_per_minute=5) as pool:
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for _, worker in zip(range(12), itertools.cycle(pool), strict=False):
                tasks.create_task(admitted(worker))
        assert 0.9 <= time.monotonic() - began < 15


async def test_a_cancelled_waiter_leaves_the_queue_to_the_next(server: Server) -> None:
    async with pool_of(server, 1, period=1, requests_per_minute=1) as (worker,):
        await admitted(worker)
        waiting = asyncio.create_task(worker.acquire(1))
        behind = asyncio.create_task(admitted(worker))
        await until(worker._turn.locked, "the one is at the full window, the other behind it")
        waiting.cancel()
        await behind
        assert waiting.cancelled()


def places(*tokens: int) -> list[Place]:
    return [Place(count) for count in tokens]


async def test_those_for_whom_there_are_tokens_go_together_for_one_request(server: Server) -> None:
    async with pool_of(server, 2, requests_per_minute=2, tokens_per_minute=100) as (one, other):
        group = places(30, 30, 5000, 10)
        task = asyncio.create_task(one.acquire_together(group))
        await until(lambda: group[1].admitted.done(), "two are admitted")
        assert [place.admitted.done() for place in group] == [True, True, False, False]
        await admitted(other, 40)  # the second request: nothing was taken for those who wait
        for place in group:
            place.admitted.cancel()
        await asyncio.wait_for(task, 20)


async def test_all_of_a_group_go_for_one_request(server: Server) -> None:
    async with pool_of(server, 1, requests_per_minute=2, tokens_per_minute=100) as (worker,):
        await worker.acquire_together(group := places(*[1] * 60))
        assert all(place.admitted.done() for place in group)
        await admitted(worker, 40)
        assert await is_full(worker)


async def test_who_gives_up_at_a_full_window_leaves_the_turn_to_the_next_of_its_group(server: Server) -> None:
    async with pool_of(server, 1, tokens_per_minute=100) as (worker,):
        await admitted(worker, 50)
        dear, cheap, also_gone = group = places(80, 20, 10)
        task = asyncio.create_task(worker.acquire_together(group))
        await until(worker._turn.locked, "the dear one is at the full window")
        also_gone.admitted.cancel()
        dear.admitted.cancel()
        await asyncio.wait_for(task, 20)
        assert cheap.admitted.result() is None
        await admitted(worker, 30)


async def test_without_a_limit_nothing_is_contacted() -> None:
    worker = RateLimits(load(), "unix:///nowhere.sock")
    await admitted(worker, 10**9)
    await worker.close()
    assert not worker.active


async def test_limits_without_redis_are_unavailable() -> None:
    worker = RateLimits(load(requests_per_minute=1), "unix:///nowhere.sock")
    with pytest.raises(Unavailable, match="millpond doctor"):
        await admitted(worker)
    await worker.close()


def test_the_estimate_counts_the_prompt_and_the_most_it_may_answer() -> None:
    body = {"messages": [{"role": "user", "content": "x" * 4000}]}
    assert 1000 + 256 <= estimate_tokens(body, "chat/completions") < 1300
    assert 1000 + 50 <= estimate_tokens(body | {"max_tokens": 50}, "chat/completions") < 1100
    assert 1000 + 150 <= estimate_tokens(body | {"max_tokens": 50, "n": 3}, "chat/completions") < 1200
    assert estimate_tokens({"input": "x" * 400}, "embeddings") < 120
