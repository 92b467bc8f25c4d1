"""Invalidation workers killed, frozen, without PostgreSQL, flushed under: all that is void goes, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from shared.embedded import EmbeddedRedis
from shared.keys import INVALIDATION_GROUP
from shared.postgres import EmbeddedPostgres
from shared.scripts import SCRIPTS
from tests import faults_support
from tests.databases import Database
from tests.faults_support import Pond, throughout, until
from tests.stock import Stock, eventually, forget
from tests.test_worker_edges import left_by_the_dead

pond = faults_support.pond
own_pond = faults_support.own_pond

POINTS = ("invalidation_after_read", "invalidation_after_l2", "invalidation_after_l3", "invalidation_after_audit")
SOME = [(point, 4 if at % 2 else 1) for at, point in enumerate(POINTS)]
OTHERS = [(point, 1 if at % 2 else 4) for at, point in enumerate(POINTS)]
#: number -> its tag; each partition has some of both
ANSWERS = {number: "b" if number % 8 < 4 else "a" for number in range(16)}
GONE = {number for number, tag in ANSWERS.items() if tag == "a"}


@pytest.fixture
async def stock(pond: Pond, database: Database) -> AsyncIterator[Stock]:
    pond.options |= {"database_url": database.url, "background_lease": 1.0}
    made = Stock(pond, database)
    for number, tag in ANSWERS.items():
        await made.store(number, tag)
    yield made


@pytest.mark.parametrize(("point", "partitions"), SOME)
async def test_a_worker_killed_at_any_point_leaves_the_rest_to_another(
    pond: Pond, partitions: int, stock: Stock, point: str
) -> None:
    async with pond.client() as client, pond.process("invalidation", fault=f"kill@{point}") as victim:
        await client.invalidate(tags=["a"])
        assert await asyncio.to_thread(victim.wait) == -9
        async with pond.working("invalidation"):
            await stock.worked_off()
    assert await stock.left() == set(ANSWERS) - GONE
    audit = await stock.audit()
    assert len(audit) == partitions
    if partitions == 1 and point in ("invalidation_after_read", "invalidation_after_audit"):
        assert (sum(row["l2"] for row in audit), sum(row["l3"] for row in audit)) == (len(GONE), len(GONE))


@pytest.mark.parametrize(("point", "partitions"), OTHERS)
async def test_a_worker_frozen_past_its_lease_does_no_harm_when_it_wakes(
    pond: Pond, partitions: int, stock: Stock, point: str
) -> None:
    async with pond.client() as client, pond.process("invalidation", fault=f"stop@{point}") as zombie:
        ids = await client.invalidate(tags=["a"])
        await asyncio.to_thread(zombie.await_stopped)
        async with pond.working("invalidation"):
            await stock.worked_off()
            for number in GONE:  # answered anew since: younger than what the zombie sweeps for
                await stock.store(number, "a", epoch=ids[stock.names(number).partition])
            audit, before = await stock.audit(), pond.keyspace()
            zombie.sigcont()
            assert await asyncio.to_thread(zombie.terminate) == 0
            assert {name: value for name, value in pond.keyspace().items() if b":swept:" not in name} == {
                name: value for name, value in before.items() if b":swept:" not in name
            }
    assert await stock.left() == set(ANSWERS)
    after = await stock.audit()
    assert [row["id"] for row in after] == [row["id"] for row in audit]
    assert sum(row["l3"] for row in after) == len(GONE) or point != "invalidation_after_l2"


@pytest.mark.parametrize("partitions", [4])
async def test_while_postgresql_is_away_l2_is_swept_and_l3_follows(
    pond: Pond, partitions: int, own_database: EmbeddedPostgres
) -> None:
    pond.options |= {"database_url": own_database.url, "background_lease": 0.4}
    stock = Stock(pond, Database("own", own_database.url))
    for number, tag in ANSWERS.items():
        await stock.store(number, tag)
    async with pond.working("invalidation", "invalidation"), pond.client() as client:
        assert await forget(client, tags=["x"]) == (0, 0)
        own_database.kill()
        found = await client.invalidate(tags=["a"], wait=1.0)
        assert (found.complete, found.l2, found.l3) == (False, len(GONE), None)
        held = pond.in_hand("invalidations", INVALIDATION_GROUP)
        assert [deliveries for _, deliveries in held.values()] == [1] * partitions
        # For several leases: whose is not renewed is delivered to the other worker, and given up in the end.
        await throughout(
            6 * 0.4, lambda: pond.in_hand("invalidations", INVALIDATION_GROUP) == held, "they stay with who read them"
        )
        own_database.restart()
        await stock.worked_off()
        assert await forget(client, tags=["x"]) == (0, 0)
    assert await stock.left() == set(ANSWERS) - GONE
    assert sum(row["l3"] for row in await stock.audit()) == len(GONE)
    assert pond.stat("dead") == 0


async def test_what_landed_before_is_swept_although_it_is_written_later(pond: Pond, stock: Stock) -> None:
    names = stock.names(0)
    async with pond.working("invalidation"), pond.client() as client:
        await forget(client, tags=["x"])
        landed = pond.redis.xadd(names.landed, {"key": "late"})
        found = await client.invalidate(tags=["a"], wait=1.5)
        assert (found.complete, found.l2) == (False, len(GONE))
        await eventually(lambda: only_left_in_l3(stock, set(ANSWERS) - GONE), "what is there is swept at once")
        await stock.persist(99, "a")  # now persistence writes it
        pond.redis.xdel(names.landed, landed)
        await stock.worked_off()
        assert await only_left_in_l3(stock, set(ANSWERS) - GONE)
    assert sum(row["l3"] for row in await stock.audit()) == len(GONE) + 1


async def test_connections_ended_in_the_middle_are_begun_again(pond: Pond, stock: Stock) -> None:
    async with pond.working("invalidation"), pond.client() as client:
        for tag in ("x", "a", "y", "b"):
            waiting = asyncio.ensure_future(client.invalidate(tags=[tag], wait=20.0))
            await stock.database.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'millpond-invalidation' AND datname = current_database()"
            )
            assert (await waiting).complete
    assert await stock.left() == set()


@pytest.mark.parametrize("partitions", [4])
async def test_after_a_flush_l3_is_swept_for_what_is_known_again(pond: Pond, partitions: int, stock: Stock) -> None:
    async with pond.working("invalidation"), pond.client() as client:
        await forget(client, tags=["x"])
        pond.redis.flushall()
        Stock(pond, stock.database)
        await until(lambda: len(pond.consumers("invalidations")) == 1, "the groups are made anew")
        assert await forget(client, tags=["a"]) == (0, len(GONE))
    assert await stock.left_in_l3() == set(ANSWERS) - GONE


async def test_what_came_to_l3_late_goes_although_a_flush_took_its_markers(pond: Pond, stock: Stock) -> None:
    async with pond.working("invalidation"), pond.client() as client:
        assert await forget(client, tags=["a"]) == (len(GONE), len(GONE))
        for number in GONE:  # they had landed before, and are persisted only now
            await stock.persist(number, "a")
        pond.redis.flushall()
        await eventually(lambda: only_left_in_l3(stock, set(ANSWERS) - GONE), "the audit is remembered")


async def only_left_in_l3(stock: Stock, expected: set[int]) -> bool:
    return await stock.left_in_l3() == expected


async def test_an_entry_that_ends_its_workers_is_given_up_and_stays_in_the_log(pond: Pond, stock: Stock) -> None:
    names = pond.all_names()[0]
    pond.redis.xadd(names.invalidations, {"by": "t", "tags": "a"})
    left_by_the_dead(pond, names.invalidations, INVALIDATION_GROUP, deliveries=pond.settings.max_deliveries)
    async with pond.working("invalidation"):
        await stock.worked_off()
    assert pond.length("invalidations") == 2
    assert pond.stat("dead") >= 1


async def test_a_worker_asked_to_stop_in_the_middle_hands_back_at_once(pond: Pond, stock: Stock) -> None:
    pond.options |= {"background_lease": 60.0}
    connection = await stock.database.connect()
    async with pond.process("invalidation") as leaving, pond.client() as client:
        async with connection.transaction():
            await connection.execute("LOCK TABLE answers IN ACCESS EXCLUSIVE MODE")
            await client.invalidate(tags=["a"])
            await until(lambda: not GONE & stock.left_in_l2(), "it waits for L3")
            assert await asyncio.to_thread(leaving.terminate) == 0
        await connection.close()
        async with pond.working("invalidation"):
            await stock.worked_off()
    assert await stock.left() == set(ANSWERS) - GONE


async def test_a_restart_of_redis_loses_no_sweep(own_pond: Pond, own_server: EmbeddedRedis, database: Database) -> None:
    own_pond.options |= {"database_url": database.url, "background_lease": 1.0}
    stock = Stock(own_pond, database)
    for number, tag in ANSWERS.items():
        await stock.store(number, tag)
    async with own_pond.client() as client:
        async with own_pond.process("invalidation", fault="stop@invalidation_after_l2") as frozen:
            await client.invalidate(tags=["a"])
            await asyncio.to_thread(frozen.await_stopped)
            own_server.restart()
        async with own_pond.working("invalidation"):
            await until(lambda: own_pond.redis.ping(), "Redis is back")
            await stock.worked_off()
    assert await stock.left() == set(ANSWERS) - GONE


async def test_what_no_text_of_postgresql_can_hold_stops_nobody(pond: Pond, stock: Stock) -> None:
    """The script takes any name; other languages' clients need not look at it as ours does."""
    names = pond.all_names()[0]
    async with pond.working("invalidation"), pond.client() as client:
        assert await forget(client, tags=["x"]) == (0, 0)
        for tag in (b"prefix:no\0body", b"no\0body"):
            call = SCRIPTS["invalidate"].call([names.invalidations, names.tags], [b"who\0\nwhy\0", 1000, tag])
            pond.redis.execute_command(*call)
        assert await forget(client, tags=["a"]) == (len(GONE), len(GONE))
        await stock.worked_off()
    async with pond.working("invalidation"), pond.client() as client:
        assert await forget(client, tags=["y"]) == (0, 0)


async def test_a_connection_cut_between_the_audit_and_its_acknowledgement_counts_nothing_twice(
    pond: Pond, stock: Stock
) -> None:
    async with pond.client() as client, pond.process("invalidation", fault="stop@invalidation_after_audit") as cut:
        assert await client.invalidate(tags=["a"])
        await asyncio.to_thread(cut.await_stopped)
        for one in pond.redis.client_list():
            if one["name"].startswith("millpond-invalidation"):
                pond.redis.client_kill_filter(_id=one["id"])
        cut.sigcont()
        await stock.worked_off()
    (audit,) = await stock.audit()
    assert (audit["l2"], audit["l3"]) == (len(GONE), len(GONE))
