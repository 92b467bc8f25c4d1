"""Embeddings of single texts go to the provider together, and come back as vectors of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest

from shared.entry import unpack
from shared.errors import ProviderError, RateLimited
from shared.providers.base import Call, Completion
from shared.providers.batching import EmbeddingBatches, shares
from shared.providers.chain import Answered, Route, ask
from shared.providers.limits import Place
from shared.providers.simulated import embed
from shared.settings import load
from tests import faults_support
from tests.conftest import Server
from tests.faults_support import Pond, outcomes
from tests.test_limits import pool_of

pond = faults_support.pond


class Counting:
    """A provider that remembers its calls; it refuses texts as it is told."""

    name = "counting"

    def __init__(self, refused: str = "", status: int = 400, spoil: dict[str, Any] | None = None) -> None:
        self.inputs: list[Any] = []
        self.refused = refused
        self.status = status
        self.spoil = spoil or {}
        self.free = asyncio.Event()
        self.free.set()
        self.cancelled = 0

    async def complete(self, call: Call) -> Completion:
        """Give vectors of three numbers."""
        asked = call.body["input"]
        self.inputs.append(asked)
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        texts = asked if isinstance(asked, list) else [asked]
        if self.refused in texts:
            raise ProviderError("refused", status=self.status)
        data = [{"index": at, "embedding": embed(text, 3)} for at, text in enumerate(texts)]
        usage = {"prompt_tokens": sum(map(len, texts)), "total_tokens": 0}
        return Completion.read(orjson.dumps({"data": data[::-1], "usage": usage} | self.spoil))

    async def close(self) -> None:
        """Nothing to give up."""


def call(text: Any, **fields: Any) -> Call:
    return Call("embeddings", {"model": "m", "input": text} | fields, 5.0)


def vector(completion: Completion) -> Any:
    assert completion.value == {"kind": "array", "dtype": "<f4", "shape": [3]}
    return np.frombuffer(completion.body, "<f4")


async def all_of(batches: EmbeddingBatches, *calls: Call) -> list[Any]:
    return await asyncio.gather(*(batches.complete(one) for one in calls), return_exceptions=True)


async def test_texts_of_one_moment_go_out_in_one_call_and_each_gets_its_own() -> None:
    batches = EmbeddingBatches(inner := Counting())
    texts = [f"text {n} {'x' * n}" for n in range(20)]
    found = await all_of(batches, *map(call, texts))
    assert inner.inputs == [texts]
    for text, one in zip(texts, found, strict=True):
        assert np.allclose(vector(one), embed(text, 3))
        assert one.prompt_tokens == len(text)


async def test_only_what_is_otherwise_alike_goes_together_and_lists_stay_lists() -> None:
    batches = EmbeddingBatches(inner := Counting())
    *_, listed = await all_of(
        batches, call("a"), call("b", dimensions=3), call("c"), call("d", model="n"), call(["e", "f"])
    )
    assert sorted(map(str, inner.inputs)) == sorted(map(str, [["a", "c"], "b", "d", ["e", "f"]]))
    assert (listed.value, [item["index"] for item in orjson.loads(listed.body)["data"]]) == (None, [1, 0])


async def test_a_call_holds_no_more_than_its_most() -> None:
    batches = EmbeddingBatches(inner := Counting(), most=8)
    await all_of(batches, *(call(f"{n}") for n in range(20)))
    assert sorted(len(asked) for asked in inner.inputs) == [4, 8, 8]


async def test_an_error_fails_all_of_a_batch() -> None:
    batches = EmbeddingBatches(inner := Counting("b", status=503))
    found = await all_of(batches, call("a"), call("b"), call("c"))
    assert inner.inputs == [["a", "b", "c"]]
    assert isinstance(found[0], ProviderError)
    assert found[0] is found[1] is found[2]


async def test_a_refused_text_fails_alone() -> None:
    batches = EmbeddingBatches(inner := Counting("b", status=400))
    found = await all_of(batches, call("a"), call("b"), call("c"))
    assert inner.inputs == [["a", "b", "c"], "a", "b", "c"]
    assert [isinstance(one, ProviderError) for one in found] == [False, True, False]


@pytest.mark.parametrize("data", [[], [{"index": 0, "embedding": [1.0]}], [{"embedding": []}] * 2, "none", [{}, {}]])
async def test_an_answer_that_does_not_hold_every_vector_is_an_error(data: Any) -> None:
    batches = EmbeddingBatches(Counting(spoil={"data": data}))
    found = await all_of(batches, call("a"), call("b"))
    assert [type(one) for one in found] == [ProviderError, ProviderError]


async def test_who_gives_up_leaves_the_others_of_a_batch_alone_and_the_last_ends_the_call() -> None:
    batches = EmbeddingBatches(inner := Counting())
    inner.free.clear()
    tasks = [asyncio.create_task(batches.complete(call(text))) for text in "ab"]
    await faults_support.until(lambda: inner.inputs, "the call is under way")
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    assert inner.cancelled == 0
    tasks[1].cancel()
    await faults_support.until(lambda: inner.cancelled, "the call ended")
    await asyncio.gather(*tasks, return_exceptions=True)
    await batches.close()


async def test_texts_that_go_out_together_are_admitted_together() -> None:
    batches, asked, open_ = EmbeddingBatches(Counting(), most=3), list[Sequence[Place]](), asyncio.Event()

    async def acquire(places: Sequence[Place]) -> None:
        asked.append(places)
        await open_.wait()
        for place in places:
            if not place.admitted.done():
                place.admitted.set_result(None)

    texts: list[Any] = ["a", "b", "c", "d"]
    tasks = [asyncio.create_task(batches.admit(call(text), 10, acquire)) for text in texts]
    await faults_support.until(lambda: sorted(map(len, asked)) == [1, 3], "three of a batch, and the fourth")
    tasks[0].cancel()
    tasks[3].cancel()
    await asyncio.wait([tasks[0], tasks[3]])
    (early,) = next(places for places in asked if len(places) == 3)[1:2]
    early.admitted.set_result(None)
    await tasks[1]
    assert not tasks[2].done()
    open_.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in found if one is not None] == [asyncio.CancelledError] * 2
    await batches.close()


async def test_what_admission_raises_is_told_to_all_it_was_asked_for() -> None:
    async def refuse(_: Sequence[Place]) -> None:
        raise RateLimited("full")

    batches = EmbeddingBatches(Counting())
    asked = [batches.admit(call(text), 1, refuse) for text in "ab"]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in found] == [RateLimited] * 2
    await batches.close()


async def test_texts_do_not_starve_beside_a_process_that_asks_text_by_text(server: Server) -> None:
    settings, stop = load(attempt_timeout=1.0, total_timeout=6.0), asyncio.Event()
    async with pool_of(server, 2, period=1, tokens_per_minute=100) as (limits, other):

        async def less() -> None:
            while not stop.is_set():
                await other.acquire(6)  # as one text

        await other.acquire(100)
        rival = asyncio.create_task(less())
        routes = [Route("counting", EmbeddingBatches(Counting()))]
        texts = [{"model": "m", "input": f"a text about {n:2}"} for n in range(8)]  # of 6 tokens each
        began = time.monotonic()
        asking = (ask(routes, "embeddings", body, settings, limits=limits) for body in texts)
        found = await asyncio.gather(*asking, return_exceptions=True)
        answered = sum(isinstance(one, Answered) for one in found)
        print(f"{answered} of {len(texts)}, {time.monotonic() - began:.2f} s")
        stop.set()  # a cancellation may be lost in a write to Redis (Python 3.11's wait_for)
        await asyncio.wait_for(rival, 20)
        assert answered == len(texts)


async def test_closing_leaves_nobody_waiting_for_admission(server: Server) -> None:
    async with pool_of(server, 1, requests_per_minute=1) as (limits,):
        await limits.acquire(1)
        batches = EmbeddingBatches(Counting())
        tasks = [asyncio.create_task(batches.admit(call(text), 1, limits.acquire_together)) for text in "ab"]
        await faults_support.until(limits._turn.locked, "they are at the full window")
        await batches.close()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found] == [asyncio.CancelledError] * 2
        assert not limits._turn.locked()


async def test_a_limit_of_requests_counts_calls_and_not_texts(pond: Pond) -> None:
    pond.options |= {"requests_per_minute": 10, "timeout": 10.0}
    texts = [f"a text about {n}" for n in range(30)]
    async with pond.working("lookup", "llm"), pond.client() as client:
        assert len(await client.embed(texts)) == 30
        await pond.settled()
    assert pond.calls() <= 10


async def test_closing_leaves_nobody_waiting() -> None:
    batches = EmbeddingBatches(inner := Counting())
    inner.free.clear()
    tasks = [asyncio.create_task(batches.complete(call(text))) for text in "ab"]
    await faults_support.until(lambda: inner.inputs, "the call is under way")
    await batches.close()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in found] == [asyncio.CancelledError] * 2


@pytest.mark.parametrize(("total", "weights"), [(10, [1, 1, 1]), (0, [3, 4]), (7, [0, 0]), (1000, [1, 10, 989])])
def test_shares_add_up(total: int, weights: list[int]) -> None:
    parts = shares(total, weights)
    assert sum(parts) == (total if sum(weights) else 0)
    assert all(abs(part - total * w / (sum(weights) or 1)) <= 1 for part, w in zip(parts, weights, strict=True))


async def test_single_texts_are_stored_as_vectors_each_with_its_share(pond: Pond) -> None:
    pond.options |= {"prices": {"e": {"input": 1e6, "output": 0.0}}, "simulated_first_token": 0.05}
    texts = [f"a text about {n}" for n in range(30)]
    async with pond.working("lookup", "llm"), pond.client() as client:
        asked = [asyncio.ensure_future(client.ask(input=t, model="e", profile="embedding")) for t in texts]
        found = [reply for reply in await outcomes(asked) if not isinstance(reply, BaseException)]
        again = await client.ask(input="A  text about 3.", model="e", profile="embedding")
        await pond.settled()
    assert len(found) == 30
    assert pond.calls() < 10
    for text, reply in zip(texts, found, strict=True):
        assert reply.value.dtype == np.float32
        assert np.allclose(reply.value, embed(text, 1536), atol=1e-6)
        entry = unpack(reply.key, pond.redis.get(pond.names("x").entry(reply.key)))
        assert entry.cost == entry.tokens[0] > 0
    assert (again.tier != "llm", np.array_equal(again.value, found[3].value)) == (True, True)
