"""The decorator: calls of a function go through the cache, by what the function depends on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from millpond import BlockingClient, Client, ComputeError, InvalidRequest
from tests import faults_support
from tests.faults_support import Pond, until

pond = faults_support.pond


@asynccontextmanager
async def using(pond: Pond) -> AsyncIterator[Client]:
    async with pond.working("lookup"), pond.client() as client:
        yield client


async def test_equal_arguments_are_computed_once_however_they_are_given(pond: Pond, partitions: int) -> None:
    runs = []
    async with using(pond) as client:

        @client.cached(profile="retrieval")
        async def search(query: str, *more: str, top_n: int = 5, **filters: str) -> list[str]:
            """Search."""
            runs.append((query, more, top_n, filters))
            return [query] * top_n

        assert await search("mill", top_n=2) == ["mill"] * 2
        assert await search(query="mill", top_n=2) == ["mill"] * 2
        assert await search("mill") == await search("mill", top_n=5) == ["mill"] * 5
        assert await search("mill", "race", colour="red") == ["mill"] * 5
        assert (search.__name__, search.__doc__) == ("search", "Search.")
    assert len(runs) == 3


async def test_two_functions_do_not_share_by_accident_and_do_by_key(pond: Pond) -> None:
    async with using(pond) as client:

        @client.cached(profile="retrieval")
        async def one(n: int) -> str:
            return f"one {n}"

        @client.cached(profile="retrieval")
        async def two(n: int) -> str:
            return f"two {n}"

        @client.cached(profile="retrieval", key="number {n}")
        async def three(n: int) -> str:
            return f"three {n}"

        assert [await one(1), await two(1), await three(1)] == ["one 1", "two 1", "three 1"]
        assert (await client.get("retrieval", "number 1")).value == "three 1"


async def test_tags_are_filled_from_the_arguments_and_invalidate(pond: Pond, partitions: int) -> None:
    runs = []
    async with using(pond) as client:

        @client.cached(profile="retrieval", tags=["doc:{doc}", "all-docs"])
        async def read(doc: int) -> int:
            runs.append(doc)
            return len(runs)

        @client.cached(profile="retrieval", key=lambda doc: {"doc": doc}, tags=lambda doc: [f"doc:{doc}"])
        def parse(doc: int) -> int:
            runs.append(doc)
            return len(runs)

        assert [await read(1), await read(2), await parse(1)] == [1, 2, 3]
        await client.invalidate(tags=["doc:1"])
        assert [await read(1), await read(2), await parse(1)] == [4, 2, 5]


async def test_a_method_says_that_it_needs_a_key(pond: Pond) -> None:
    async with using(pond) as client:

        class Mill:
            @client.cached(profile="retrieval")
            async def grind(self, grain: str) -> str:
                return grain

            @client.cached(profile="retrieval", key="{grain}")
            async def grind_by_key(self, grain: str) -> str:
                return grain + "!"

        with pytest.raises(InvalidRequest, match="args cannot be written as JSON"):
            await Mill().grind("rye")
        assert await Mill().grind_by_key("rye") == "rye!"


async def test_what_does_not_fit_is_refused_before_anything_runs(pond: Pond) -> None:
    async with using(pond) as client:

        @client.cached(profile="retrieval", tags=["doc:{document}"])
        async def read(doc: int) -> int:
            raise AssertionError("it ran")

        with pytest.raises(TypeError, match="doc"):
            await read()  # type: ignore[call-arg]
        with pytest.raises(InvalidRequest) as refused:
            await read(1)
        assert refused.value.field == "tags"


# without an event loop


@contextmanager
def blocking(pond: Pond) -> Iterator[BlockingClient]:
    """A blocking client, and a lookup worker in a loop of its own."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with pond.working("lookup"):
            begun.set()
            await ended.wait()

    with BlockingClient(settings=pond.settings) as client:
        working = asyncio.run_coroutine_threadsafe(work(), client._loop)
        asyncio.run_coroutine_threadsafe(until(begun.is_set, "the worker reads"), client._loop).result(20)
        try:
            yield client
        finally:
            client._loop.call_soon_threadsafe(ended.set)
            working.result(20)


def test_a_blocking_client_leaves_plain_functions_plain(pond: Pond) -> None:
    runs: list[Any] = []
    with blocking(pond) as client:

        @client.cached(profile="retrieval", key="{query}", tags=["q:{query}"], ttl=100)
        def search(query: str) -> list[str]:
            runs.append(query)
            if query == "nothing":
                raise LookupError(query)
            return [query]

        assert [search("mill"), search("mill")] == [["mill"]] * 2
        with pytest.raises(LookupError):
            search("nothing")
        assert client.get("retrieval", "mill").value == ["mill"]
        client.invalidate(tags=["q:mill"])
        assert search("mill") == ["mill"]
    assert runs == ["mill", "nothing", "mill"]


def test_a_blocking_client_has_all_of_it(pond: Pond) -> None:
    with blocking(pond) as client:
        missed = client.get("retrieval", {"q": 1})
        client.put("retrieval", {"q": 1}, [1], epoch=missed.epoch)
        assert client.get("retrieval", {"q": 1}).value == [1]
        assert client.exists("retrieval", {"q": 1})
        assert client.info("retrieval", {"q": 1}) is not None
        client.delete("retrieval", {"q": 1})
        assert not client.exists("retrieval", {"q": 1})
        assert client.get_or_compute("retrieval", {"q": 1}, lambda: (1, 2)) == [1, 2]
        with pytest.raises(ZeroDivisionError):
            client.get_or_compute("retrieval", {"q": 2}, lambda: 1 // 0)


def test_an_error_says_its_kind() -> None:
    assert ComputeError("x", kind="KeyError").to_wire() == {"code": "compute_error", "message": "x", "kind": "KeyError"}
