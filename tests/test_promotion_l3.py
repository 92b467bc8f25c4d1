"""What is hit and no longer in L2 comes back from PostgreSQL, unless it was invalidated, pruned or is past its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from shared.counters import Counters
from shared.database import connect_pool
from shared.link import Link
from shared.postgres import EmbeddedPostgres
from shared.tiers.l3 import L3
from tests import faults_support
from tests.databases import Database
from tests.faults_support import Pond, until
from tests.shelf import DAY_MS, HOUR_MS, PROBATION_MS, Shelf, key
from workers.promotion import Hits, Promoter, Tended, sweep

pond = faults_support.pond

SLACK_MS = 5_000


@pytest.fixture
def shelf(pond: Pond, database: Database) -> Iterator[Shelf]:
    pond.options |= {"database_url": database.url, "background_lease": 1.0}
    yield Shelf(pond)
    pond.redis.delete(*(names.tags for names in pond.all_names()))


async def test_what_is_hit_in_l1_and_has_left_l2_comes_back(
    pond: Pond, partitions: int, shelf: Shelf, database: Database
) -> None:
    texts = [shelf.text(age_ms=HOUR_MS, body=b'{"n":%d}' % number) for number in range(8)]
    for number, text in enumerate(texts):
        await shelf.keep(database.url, number, text)
    async with pond.working("promotion"):
        for number in range(7):
            shelf.report({number: [1, 0, 0]})
        await shelf.handled()
    assert [shelf.get(number) for number in range(8)] == [*texts[:7], None]
    assert PROBATION_MS + HOUR_MS - SLACK_MS < shelf.left_ms(0) <= PROBATION_MS + HOUR_MS + SLACK_MS
    assert pond.stat("rehydrated") == 7


async def test_nothing_comes_back_for_longer_than_it_has_left(pond: Pond, shelf: Shelf, database: Database) -> None:
    await shelf.keep(database.url, 1, shelf.text(age_ms=HOUR_MS, ttl_ms=HOUR_MS + 60_000))
    await shelf.keep(database.url, 2, shelf.text(age_ms=HOUR_MS, ttl_ms=HOUR_MS - 1))
    shelf.report({1: [9, 0, 0], 2: [9, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert 0 < shelf.left_ms(1) <= 60_000
    assert shelf.get(2) is None


async def test_what_was_invalidated_does_not_come_back(
    pond: Pond, partitions: int, shelf: Shelf, database: Database
) -> None:
    await shelf.keep(database.url, 1, shelf.text("doc:1"))
    shelf.invalidate(1, "doc:1")
    shelf.report({1: [9, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.get(1) is None


async def test_what_belongs_to_another_life_of_the_log_does_not_come_back(
    pond: Pond, shelf: Shelf, database: Database
) -> None:
    await shelf.keep(database.url, 1, shelf.text(epoch="9999999999999-0"))
    shelf.report({1: [9, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.get(1) is None


async def test_a_hit_of_yesterday_brings_nothing_back(pond: Pond, shelf: Shelf, database: Database) -> None:
    """A worker that was away for a day finds reports of what was popular then."""
    await shelf.keep(database.url, 1, shelf.text(age_ms=DAY_MS, ttl_ms=10 * DAY_MS))
    await shelf.keep(database.url, 2, shelf.text(age_ms=DAY_MS, ttl_ms=10 * DAY_MS))
    before = pond.now_ms() - DAY_MS + 1000
    shelf.report({1: [9, 0, 0]}, at=f"{before}-0")
    shelf.report({2: [9, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.get(1) is None
    assert shelf.get(2) is not None


@pytest.mark.parametrize(("moved", "comes_back"), [("nothing", True), ("doc:1", False), ("#fence", False)])
async def test_what_happens_between_the_question_and_the_writing_counts(
    pond: Pond, shelf: Shelf, database: Database, moved: str, comes_back: bool
) -> None:
    """The worker is frozen with PostgreSQL's answer in hand, while it is invalidated or its markers are pruned."""
    await shelf.keep(database.url, 1, shelf.text("doc:1"))
    async with pond.process("promotion", fault="stop@promotion_after_find", ready=False) as frozen:
        shelf.report({1: [9, 0, 0]})
        await asyncio.to_thread(frozen.await_stopped)
        if moved == "#fence":
            pond.redis.hincrby(shelf.names(1).tags, "#fence", 1)
        elif moved != "nothing":
            shelf.invalidate(1, moved)
        frozen.sigcont()
        await shelf.handled()
    assert (shelf.get(1) is not None) == comes_back


async def test_a_promotion_worker_killed_with_an_answer_in_hand_leaves_it_to_another(
    pond: Pond, shelf: Shelf, database: Database
) -> None:
    await shelf.keep(database.url, 1, shelf.text())
    async with pond.process("promotion", fault="kill@promotion_after_find", ready=False) as victim:
        shelf.report({1: [1, 0, 0]})
        assert await asyncio.to_thread(victim.wait) == -9
    assert shelf.get(1) is None
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.get(1) is not None


async def test_while_postgresql_is_away_hits_still_count_and_afterwards_things_come_back(
    pond: Pond, own_database: EmbeddedPostgres
) -> None:
    pond.options |= {"database_url": own_database.url}
    shelf = Shelf(pond)
    await shelf.keep(own_database.url, 1, shelf.text())
    own_database.kill()
    async with pond.working("promotion"):
        shelf.put(2, left_ms=30_000)
        shelf.report({1: [1, 0, 0], 2: [1, 0, 0]})
        await shelf.handled()
        assert shelf.left_ms(2) > 30_000
        assert shelf.get(1) is None
        await asyncio.to_thread(own_database.restart)
        async with _reporting(shelf, 1):
            await until(lambda: shelf.get(1), "it comes back")
        await shelf.handled()
    pond.redis.delete(*(names.tags for names in pond.all_names()))


async def test_a_session_that_postgresql_ends_costs_a_hit_at_most(pond: Pond, shelf: Shelf, database: Database) -> None:
    await shelf.keep(database.url, 1, shelf.text())
    await shelf.keep(database.url, 2, shelf.text())
    async with pond.working("promotion"):
        shelf.report({1: [1, 0, 0]})
        await until(lambda: shelf.get(1), "the worker is connected")
        ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND "
        assert await database.value(ended + "pid <> pg_backend_pid() AND application_name LIKE 'millpond%'") > 0
        async with _reporting(shelf, 2):
            await until(lambda: shelf.get(2), "it asks again")
        await shelf.handled()


@asynccontextmanager
async def _reporting(shelf: Shelf, number: int) -> AsyncIterator[None]:
    """Report a hit again and again, as a worker does whose L1 holds the answer."""

    async def report() -> None:
        while True:
            shelf.report({number: [1, 0, 0]})
            await asyncio.sleep(0.1)

    reporting = asyncio.create_task(report())
    try:
        yield
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)


async def test_while_redis_is_short_of_memory_lives_are_short_and_nothing_comes_back(
    pond: Pond, shelf: Shelf, database: Database
) -> None:
    await shelf.keep(database.url, 2, shelf.text())
    shelf.put(1, left_ms=30_000, age_ms=HOUR_MS)
    link, tier = Link(pond.url), L3(database.url, Counters(), timeout=5.0)
    promoter = Promoter(link, shelf.names(1), pond.settings.all_profiles)
    hits = {key(1): Hits(1, pond.now_ms()), key(2): Hits(1, pond.now_ms())}
    try:
        assert await promoter.tend(hits, tier, pressure=True) == Tended(prolonged=1, absent=1)
        assert abs(shelf.left_ms(1) - (PROBATION_MS + HOUR_MS) / 10) < SLACK_MS
        assert await promoter.tend(hits, tier) == Tended(prolonged=1, absent=1, written=1)
    finally:
        await tier.close()
        await link.close()


# the periodic sweep


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[asyncpg.Pool]:
    pool = await connect_pool(database.url, size=2)
    yield pool
    await pool.close()


@pytest.fixture
async def link(pond: Pond) -> AsyncIterator[Link]:
    link = Link(pond.url)
    yield link
    await link.close()


async def _hit(database: Database, number: int, hits: int, ago: str = "0 hours") -> None:
    await database.fetch("SELECT ensure_partitions(1)")
    await database.fetch(
        "INSERT INTO top_keys VALUES (date_trunc('hour', now() - $1::text::interval), $2, $3)",
        ago, bytes.fromhex(key(number)), hits,
    )  # fmt: skip


async def test_a_sweep_does_what_events_missed_and_nothing_the_second_time(
    pond: Pond, partitions: int, shelf: Shelf, database: Database, pool: asyncpg.Pool, link: Link
) -> None:
    await shelf.keep(database.url, 1, shelf.text(age_ms=HOUR_MS))
    await shelf.keep(database.url, 2, shelf.text("doc:2", age_ms=HOUR_MS))
    shelf.put(3, age_ms=HOUR_MS)
    shelf.put(4, "doc:4")
    for number in range(1, 6):
        await _hit(database, number, 10 * number)
    shelf.invalidate(2, "doc:2")
    shelf.invalidate(4, "doc:4")
    found = await sweep(link, pool, pond.settings, pond.partitions)
    assert found == {"top": 5, "prolonged": 1, "present": 0, "absent": 3, "void": 1, "written": 1}
    assert [shelf.get(number) is not None for number in range(1, 6)] == [True, False, True, False, False]
    assert shelf.left_ms(1) > PROBATION_MS
    found = await sweep(link, pool, pond.settings, pond.partitions)
    assert (found["top"], found["void"], found["written"]) == (5, 0, 0)


async def test_a_sweep_is_bounded_and_begins_with_what_is_hit_most(
    pond: Pond, shelf: Shelf, database: Database, pool: asyncpg.Pool, link: Link
) -> None:
    for number in range(1, 6):
        await shelf.keep(database.url, number, shelf.text())
        await _hit(database, number, number)
    found = await sweep(link, pool, pond.settings, pond.partitions, most=2)
    assert (found["top"], found["written"]) == (2, 2)
    assert [shelf.get(number) is not None for number in range(1, 6)] == [False, False, False, True, True]


async def test_a_sweep_writes_nothing_back_while_redis_is_short_of_memory(
    pond: Pond, shelf: Shelf, database: Database, pool: asyncpg.Pool, link: Link
) -> None:
    await shelf.keep(database.url, 1, shelf.text())
    await _hit(database, 1, 5)
    pond.redis.set("mp:pressure", "1", px=60_000)
    assert (await sweep(link, pool, pond.settings, pond.partitions))["written"] == 0
    assert shelf.get(1) is None
