"""Markers go once nothing is left that they void; nothing that was void before ever comes back, by any way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from shared.database import connect_pool
from shared.keys import PartitionKeys
from shared.link import Link
from shared.scripts import SCRIPTS, Arg
from tests import faults_support
from tests.databases import Database
from tests.faults_support import Pond, until
from tests.shelf import DAY_MS, GENESIS, key
from tests.stock import Stock, eventually, forget
from workers.prune import Pruned, prune

pond = faults_support.pond

POINTS = ("prune_after_begin", "prune_after_floor", "prune_after_l3", "prune_after_l2")
#: number -> its tags
ANSWERS: dict[int, tuple[str, ...]] = {0: ("a",), 1: ("b",), 2: ("doc:1",), 3: ("c",), 4: ()}


@pytest.fixture
async def stock(pond: Pond, database: Database) -> AsyncIterator[Stock]:
    pond.options |= {"database_url": database.url, "background_lease": 1.0}
    made = Stock(pond, database)
    for number, tags in ANSWERS.items():
        await made.store(number, *tags)
    yield made


class Tools:
    """What a pruning needs, for partition 0."""

    def __init__(self, link: Link, pool: asyncpg.Pool | None) -> None:
        self.link = link
        self.pool = pool
        self.keys = PartitionKeys(0)

    async def prune(self, older_than: float = 0.0, patience: float = 0.0) -> Pruned:
        """Prune, by default all markers and without waiting."""
        return await prune(self.link, self.pool, self.keys, older_than=older_than, patience=patience)

    async def rehydrate(self, number: int, text: bytes, fence: bytes | None, *asked: str) -> bool:
        """Write a row back into L2 as a lookup worker does."""
        args: list[Arg] = [fence or b"0", key(number), text, DAY_MS, "\n".join(asked)]
        names = [self.keys.tags, self.keys.entry(key(number))]
        (accepted,) = await self.link.call(SCRIPTS["rehydrate"].call(names, args))
        return bool(accepted)

    async def fence(self) -> bytes | None:
        """Return where the fence stands."""
        found: bytes | None = await self.link.call(("HGET", self.keys.tags, "#fence"))
        return found


@asynccontextmanager
async def tools(pond: Pond, *, database: bool = True) -> AsyncIterator[Tools]:
    link = Link(pond.url)
    pool = await connect_pool(pond.options["database_url"], size=2) if database else None
    try:
        yield Tools(link, pool)
    finally:
        await link.close()
        if pool is not None:
            pool.terminate()


def later(pond: Pond) -> None:
    """Let the server's clock move past the millisecond of the newest invalidation."""
    last = int(pond.redis.hget(PartitionKeys(0).tags, "#last").split(b"-")[0])
    while int(pond.redis.time()[0]) * 1000 + pond.redis.time()[1] // 1000 <= last + 1:
        pass


@pytest.mark.every_postgresql
async def test_what_the_markers_void_goes_before_they_do(pond: Pond, stock: Stock) -> None:
    async with pond.client() as client, tools(pond) as at:
        await client.invalidate(tags=["a"])
        ids = await client.invalidate(prefix="doc:")
        later(pond)
        found = await at.prune()
        assert (found.state, found.horizon, found.markers, found.l2, found.l3) == ("done", ids[0], 2, 2, 2)
        assert await stock.left() == {1, 3, 4}
        assert set(pond.redis.hgetall(at.keys.tags)) == {b"#last", b"#pruned", b"#fence"}
        ((ms, seq),) = await stock.database.fetch("SELECT epoch_ms, epoch_seq FROM floors WHERE partition = 0")
        assert f"{ms}-{seq}" == ids[0]
        assert (await at.prune()).state == "nothing"


async def test_young_markers_and_those_that_moved_stay(pond: Pond, stock: Stock) -> None:
    async with pond.client() as client, tools(pond) as at:
        await client.invalidate(tags=["a", "b"])
        assert (await at.prune(older_than=60)).state == "nothing"
        old = pond.redis.hgetall(at.keys.tags)
        ids = await client.invalidate(tags=["b"], prefix="c")
        pairs: list[Any] = [part for label in (b"a", b"b") for part in (label, old[label])]
        assert await at.link.call(SCRIPTS["prune"].call([at.keys.tags], ["end", *pairs, "prefix:c", "1-0"])) == 1
        left = pond.redis.hgetall(at.keys.tags)
    assert left[b"b"].decode() == ids[0]
    assert left[b"#prefixes"] == f"{ids[0]} c".encode()
    assert b"a" not in left


async def test_a_flight_that_began_before_the_horizon_answers_and_is_not_stored(pond: Pond, stock: Stock) -> None:
    pond.options |= {"simulated_first_token": 1.0}
    async with pond.working("lookup", "llm"), pond.client() as client, tools(pond) as at:
        asked = asyncio.ensure_future(client.ask("q", tags=["mine"]))
        await until(lambda: pond.calls() == 1, "the provider is called")
        await client.invalidate(tags=["other"])
        later(pond)
        assert (await at.prune()).state == "done"
        reply = await asked
        assert (reply.tier, reply.stored, reply.detail) == ("llm", False, "invalidated")
        again = await client.ask("q", tags=["mine"])
        assert (again.stored, pond.calls()) == (True, 2)


async def test_a_flight_from_before_the_horizon_is_not_joined(pond: Pond, stock: Stock) -> None:
    pond.options |= {"simulated_first_token": 1.0}
    async with pond.working("lookup", "llm"), pond.client() as client, tools(pond) as at:
        first = asyncio.ensure_future(client.ask("q"))
        await until(lambda: pond.calls() == 1, "the provider is called")
        await client.invalidate(tags=["other"])
        later(pond)
        await at.prune()
        second = await client.ask("q", tags=["other"])
        assert (second.collapsed, second.stored, pond.calls()) == (False, True, 2)
        assert not (await first).stored


async def test_an_answer_stored_before_the_horizon_serves_those_whose_tags_it_carries(pond: Pond, stock: Stock) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client, tools(pond) as at:
        await client.ask("q", tags=["mine"])
        await client.invalidate(tags=["other"])
        later(pond)
        await at.prune()
        assert (await client.ask("q", tags=["mine"])).tier in ("l1", "l2")
        assert (await client.ask("q", tags=["other"])).tier == "llm"


async def test_a_row_read_before_the_pruning_comes_too_late(pond: Pond, stock: Stock) -> None:
    async with pond.client() as client, tools(pond) as at:
        fence, void, valid = await at.fence(), stock.text("a"), stock.text("b")
        await client.invalidate(tags=["a"])
        later(pond)
        assert not await at.rehydrate(0, void, fence), "its marker is there"
        await at.prune()
        assert not await at.rehydrate(0, void, fence), "its marker is gone, and the fence has moved"
        assert not await at.rehydrate(1, valid, fence)
        assert await at.rehydrate(1, valid, await at.fence())
        assert not await at.rehydrate(1, valid, await at.fence(), "foreign"), "nobody can tell of a foreign tag"
    assert stock.get(0) is None


async def test_pruning_waits_for_what_landed_before_it(pond: Pond, stock: Stock) -> None:
    async with pond.client() as client, tools(pond) as at:
        landed = pond.redis.xadd(at.keys.landed, {"key": key(0), "entry": stock.text("a")})
        await client.invalidate(tags=["a"])
        later(pond)
        assert (await at.prune(patience=0.1)).state == "waiting"
        assert pond.redis.hget(at.keys.tags, "a") is not None
        fence, waiting = await at.fence(), asyncio.ensure_future(at.prune(patience=20))
        await eventually(lambda: has_moved(at, fence), "it has begun")
        later(pond)
        pond.redis.xadd(at.keys.landed, {"key": key(1)})  # younger: it does not have to go
        pond.redis.xdel(at.keys.landed, landed)
        assert (await waiting).state == "done"


async def test_a_transaction_that_looked_for_the_floor_before_there_was_one_is_waited_for(
    pond: Pond, stock: Stock
) -> None:
    writer = await stock.database.connect()
    try:
        async with pond.client() as client, tools(pond) as at:
            await client.invalidate(tags=["a"])
            later(pond)
            async with writer.transaction():
                assert await writer.fetch("SELECT FROM floors WHERE partition = 0 FOR SHARE") == []
                pruning = asyncio.ensure_future(at.prune())
                await eventually(lambda: waits_for_a_lock(stock), "the pruning waits")
                await writer.execute("UPDATE answers SET tags = tags || ARRAY['late'] WHERE key = $1", bytes(16))
            assert (await pruning).state == "done"
        assert 0 not in await stock.left()
    finally:
        await writer.close()


async def waits_for_a_lock(stock: Stock) -> bool:
    return bool(await stock.database.value("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_without_a_database_nothing_is_pruned_where_answers_are_persisted(pond: Pond, stock: Stock) -> None:
    async with pond.client() as client, tools(pond, database=False) as at:
        await client.invalidate(tags=["a"])
        later(pond)
        pond.redis.xgroup_create(at.keys.landed, "persistence", "0", mkstream=True)
        assert (await at.prune()).state == "no-database"
        assert pond.redis.hget(at.keys.tags, "a") is not None
        pond.redis.delete(at.keys.landed)
        found = await at.prune()
        assert (found.state, found.l2, found.l3) == ("done", 1, None)


@pytest.mark.parametrize(("point", "partitions"), [(point, 4 if at % 2 else 1) for at, point in enumerate(POINTS)])
async def test_a_pruning_that_dies_anywhere_is_finished_by_the_next(
    pond: Pond, partitions: int, stock: Stock, point: str
) -> None:
    pond.options |= {"marker_age": 0.2, "background_lease": 1.0}
    async with pond.client() as client:
        await client.invalidate(tags=["a"], prefix="doc:")
        async with pond.process("invalidation", fault=f"kill@{point}") as victim:
            assert await asyncio.to_thread(victim.wait) == -9
        async with pond.working("invalidation"):
            await until(lambda: not any(pond.redis.hexists(k.tags, "a") for k in pond.all_names()), "all is pruned")
            assert not any(pond.redis.hexists(k.tags, "#prefixes") for k in pond.all_names())
            await forget(client, tags=["x"])
            await stock.worked_off()
    assert await stock.left() == {1, 3, 4}


@pytest.mark.parametrize("point", POINTS)
async def test_a_pruning_frozen_anywhere_takes_no_marker_that_moved_meanwhile(
    pond: Pond, stock: Stock, point: str
) -> None:
    async with pond.client() as client:
        await client.invalidate(tags=["a"])
        async with pond.process("invalidation", fault=f"stop@{point}", marker_age=0.2) as zombie:
            await asyncio.to_thread(zombie.await_stopped)
            await client.invalidate(tags=["a"])
            stock.put(0, "a", left_ms=DAY_MS, epoch=GENESIS)
            async with tools(pond) as at:
                fence = await at.fence()
                zombie.sigcont()
                await eventually(lambda: has_moved(at, fence), "it goes on")
                # Of the marker that moved either it or nothing that it voids is left.
                fetch = SCRIPTS["fetch"].call([at.keys.tags, at.keys.entry(key(0))], [key(0), ""])
                assert not isinstance((await at.link.call(fetch))[1], bytes)
            await stock.worked_off()


@pytest.mark.parametrize("partitions", [4])
async def test_a_persistence_worker_frozen_before_a_pruning_brings_nothing_back(
    pond: Pond, partitions: int, database: Database
) -> None:
    """What it read is void by the time it wakes; the marker that said so is gone, the floor is not."""
    pond.options |= {"database_url": database.url, "background_lease": 1.0, "simulated_first_token": 0.0}
    async with (
        pond.process("persistence", fault="stop@persistence_after_read") as zombie,
        pond.working("lookup", "llm"),
        pond.client() as client,
    ):
        asked = await client.ask("q", tags=["a"])
        await asyncio.to_thread(zombie.await_stopped)
        async with pond.working("persistence"):  # takes over what the frozen one holds
            await until(lambda: not pond.length("landed"), "it is persisted by another")
        await client.invalidate(tags=["a"])
        async with pond.working("invalidation", marker_age=0.2):
            await until(lambda: not any(pond.redis.hexists(k.tags, "a") for k in pond.all_names()), "it is pruned")
        assert await database.fetch("SELECT FROM answers") == []
        zombie.sigcont()
        await client.ask("another")
        await until(lambda: not pond.length("landed"), "it is at work again")
        assert await asyncio.to_thread(zombie.terminate) == 0
        keys = [row["key"].hex() for row in await database.fetch("SELECT key FROM answers")]
        assert asked.key not in keys
        assert len(keys) == 1
        assert (await client.ask("q", tags=["a"])).tier == "llm"


async def has_moved(at: Tools, fence: bytes | None) -> bool:
    return await at.fence() != fence
