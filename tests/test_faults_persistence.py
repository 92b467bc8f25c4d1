"""The persistence worker and PostgreSQL killed, frozen, cut off from each other: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from shared.keys import PERSISTENCE_GROUP
from tests import faults_support
from tests.faults_support import Pond, throughout, until
from tests.persistence_support import (
    call_of,
    count,
    entry_of,
    held_by,
    is_written,
    key_of,
    lag,
    land,
    owners,
    rows,
    touch,
)

pond = faults_support.pond

ANSWERS, REPORTS = 60, 20
LEASE = 0.6
POINTS = ["persistence_after_read", "persistence_after_commit", "persistence_after_ack"]
#: The persistence workers' connections that stand before a lock.
WAITING = """SELECT {} FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'millpond-persistence' AND wait_event_type = 'Lock'"""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest) -> None:
    """Leases short enough that a fault, its lease and its recovery fit into two seconds."""
    request.getfixturevalue("pond").options |= {"background_lease": LEASE, "drain_timeout": 0.5}


def load(pond: Pond, *, first: int = 0) -> None:
    """Publish answers and reports of hits, some of each to every partition."""
    for number in range(first, first + ANSWERS):
        land(pond, number, call=call_of(experiment="e", variant=f"v{number % 2}"))
    for number in range(REPORTS):
        touch(pond, 2, keys=[number], partition=number % pond.partitions)


async def whole(pond: Pond, url: str, *, times: int = 1) -> None:
    """Wait until everything is written; each answer, call and hit of `times` loads must be there, once."""
    await until(lambda: is_written(pond), "everything is written", timeout=25)
    assert await count(url, "answers") == ANSWERS * times
    assert await count(url, "calls") == ANSWERS * times
    assert await rows(url, "SELECT sum(hits), sum(histogram[1]), sum(cost) FROM hits") == [
        (2 * REPORTS * times, 2 * REPORTS * times, 0.25 * REPORTS * times)
    ]
    assert await rows(url, "SELECT sum(hits) FROM top_keys") == [(2 * REPORTS * times,)]
    assert pond.length("dead") == 0
    assert pond.length("touches") == REPORTS * times, "they stay for the other group"


@asynccontextmanager
async def locked(url: str, table: str) -> AsyncIterator[asyncpg.Connection]:
    """Keep a table to ourselves: whoever writes to it waits in the middle of its transaction.

    Yields a connection of its own: one in a transaction sees who waits only as it was at the first look.
    """
    holding, looking = await asyncpg.connect(url), await asyncpg.connect(url)
    try:
        async with holding.transaction():
            await holding.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield looking
    finally:
        await holding.close()
        await looking.close()


async def wait_for_lock(connection: asyncpg.Connection, then: str = "pid") -> None:
    """Wait until a worker stands before the lock; `then` is what is asked of PostgreSQL for each that does."""
    deadline = time.monotonic() + 15
    while not await connection.fetchval(WAITING.format(f"count({then})")):
        assert time.monotonic() < deadline, "nobody waits for the lock"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_any_point_it_loses_nothing_and_doubles_nothing(
    pond: Pond, database: Any, partitions: int, point: str
) -> None:
    load(pond)
    async with pond.process("persistence", fault=f"kill@{point}", ready=False, database_url=database.url) as victim:
        assert await asyncio.to_thread(victim.wait) == -9
    async with pond.working("persistence", database_url=database.url):
        await whole(pond, database.url)


async def test_killed_again_and_again_under_load_it_loses_nothing_and_doubles_nothing(
    pond: Pond, database: Any, rng: random.Random
) -> None:
    for number, point in enumerate(POINTS):
        load(pond, first=number * ANSWERS)
        nth = rng.randrange(1, 3)
        async with pond.process(
            "persistence", fault=f"kill@{point}:{nth}", ready=False, database_url=database.url
        ) as victim:
            await until(lambda: not victim.running or is_written(pond), "it died, or wrote everything")
    async with pond.working("persistence", database_url=database.url):
        await whole(pond, database.url, times=len(POINTS))


@pytest.mark.parametrize("point", POINTS[:2])
async def test_frozen_past_its_lease_it_revives_nothing_and_acknowledges_nothing(
    pond: Pond, database: Any, partitions: int, point: str
) -> None:
    load(pond)
    async with pond.process("persistence", fault=f"stop@{point}", ready=False, database_url=database.url) as zombie:
        await asyncio.to_thread(zombie.await_stopped)
        async with pond.working("persistence", database_url=database.url):
            await whole(pond, database.url)
            # What was invalidated meanwhile was deleted, its markers pruned: nothing but the floor tells.
            await rows(database.url, "UPDATE floors SET epoch_ms = 2")
            await rows(database.url, "DELETE FROM answers")
            zombie.sigcont()
            await until(lambda: "belong to another worker" in zombie.errors, "it learns of its loss")
            assert await asyncio.to_thread(zombie.terminate) == 0
            assert await count(database.url, "answers") == 0
            assert await rows(database.url, "SELECT sum(hits) FROM hits") == [(2 * REPORTS,)]
            assert await count(database.url, "calls") == ANSWERS
    assert pond.length("dead") == 0


async def test_a_zombie_takes_nothing_from_who_holds_it_now(pond: Pond, database: Any) -> None:
    load(pond)
    fault = "stop@persistence_after_commit"
    async with pond.process("persistence", fault=fault, ready=False, database_url=database.url) as zombie:
        await asyncio.to_thread(zombie.await_stopped)
        before = owners(pond, "landed")
        async with locked(database.url, "ONLY applied") as ours, pond.working("persistence", database_url=database.url):
            await wait_for_lock(ours)  # the healthy one holds the reports, and cannot commit yet
            held = owners(pond, "touches") - before
            assert held
            zombie.sigcont()
            await until(lambda: "belong to another worker" in zombie.errors, "it learns of its loss")
            assert owners(pond, "touches") >= held
            zombie.sigkill()
        async with pond.working("persistence", database_url=database.url):
            await whole(pond, database.url)


@pytest.mark.parametrize("table", ["answers", "hits"])
async def test_a_backend_terminated_in_the_middle_of_a_batch_costs_a_repetition(
    pond: Pond, database: Any, partitions: int, table: str
) -> None:
    async with pond.working("persistence", database_url=database.url):
        async with locked(database.url, table) as ours:
            load(pond)
            for _ in range(3):
                await wait_for_lock(ours, "pg_terminate_backend(pid, 5000)")
        await whole(pond, database.url)


async def test_while_postgresql_is_slow_it_keeps_its_lease(pond: Pond, database: Any) -> None:
    async with pond.process("persistence", database_url=database.url) as slow:
        async with locked(database.url, "answers") as ours:
            load(pond)
            await wait_for_lock(ours)
            held = held_by(pond, "landed", slow.name)
            assert set(held.values()) == {1}
            await throughout(3 * LEASE, lambda: held_by(pond, "landed", slow.name) == held, "it holds them")
            assert pond.longest_idle("landed", PERSISTENCE_GROUP) < LEASE, "nobody could take them over"
        await whole(pond, database.url)
    assert pond.stat("leases_lost") == 0


async def test_a_database_that_goes_down_under_load_gets_everything_when_it_is_back(
    pond: Pond, own_database: Any, partitions: int
) -> None:
    async with pond.process("persistence", database_url=own_database.url) as worker:
        load(pond)
        await until(lambda: is_written(pond), "it works")
        own_database.kill()
        load(pond, first=ANSWERS)
        await until(lambda: "PostgreSQL is away" in worker.errors, "it has noticed")
        first = held_by(pond, "landed", worker.name)

        def unblamed() -> bool:
            held = held_by(pond, "landed", worker.name)
            return held.keys() >= first.keys() and set(held.values()) == {1}

        for number in range(2, 6):
            load(pond, first=number * ANSWERS)
            await throughout(LEASE, unblamed, "it holds what it had read, and the outage is not the messages' fault")
        assert pond.longest_idle("landed", PERSISTENCE_GROUP) < LEASE, "nobody could take them over"
        assert pond.length("landed") == 5 * ANSWERS
        await asyncio.to_thread(own_database.restart)
        await whole(pond, own_database.url, times=6)
        assert worker.errors.count("PostgreSQL is away") == 1
        await until(lambda: worker.errors.count("PostgreSQL is back") == 1, "it says so")


async def test_killed_again_and_again_while_the_database_is_down_no_message_is_blamed(
    pond: Pond, own_database: Any
) -> None:
    pond.options |= {"max_deliveries": 2}
    load(pond)
    fault = "kill@persistence_after_read"
    async with pond.process("persistence", fault=fault, ready=False, database_url=own_database.url) as victim:
        assert await asyncio.to_thread(victim.wait) == -9
    own_database.kill()
    left = pond.in_hand("landed", PERSISTENCE_GROUP)
    assert left
    for _ in range(2):
        async with pond.process("persistence", database_url=own_database.url) as victim:
            await until(lambda: "PostgreSQL is away" in victim.errors, "it has noticed")
            # The first one's lease runs out meanwhile: what it left could be taken over.
            await throughout(
                2 * LEASE, lambda: pond.in_hand("landed", PERSISTENCE_GROUP) == left, "nothing is taken over"
            )
            victim.sigkill()
    await asyncio.to_thread(own_database.restart)
    async with pond.working("persistence", database_url=own_database.url):
        await whole(pond, own_database.url)


async def test_stopped_while_the_database_is_down_it_hands_back_what_it_holds(
    pond: Pond, own_database: Any, partitions: int
) -> None:
    pond.options |= {"background_lease": 30.0, "max_deliveries": 2}
    async with pond.process("persistence", database_url=own_database.url):
        pass  # the streams are there
    own_database.kill()
    load(pond)
    for _ in range(3):
        async with pond.process("persistence", database_url=own_database.url) as worker:
            await until(lambda: "PostgreSQL is away" in worker.errors, "it has noticed")
            assert await asyncio.to_thread(worker.terminate) == 0
    await asyncio.to_thread(own_database.restart)
    async with pond.working("persistence", database_url=own_database.url):
        await whole(pond, own_database.url)  # at once, although the lease is long


async def test_stopped_in_the_middle_of_a_batch_it_hands_it_back(pond: Pond, database: Any) -> None:
    pond.options |= {"background_lease": 30.0, "drain_timeout": 0.2}
    load(pond)
    async with (
        locked(database.url, "answers") as ours,
        pond.process("persistence", database_url=database.url) as worker,
    ):
        await wait_for_lock(ours)
        assert await asyncio.to_thread(worker.terminate) == 0
        assert worker.name not in owners(pond, "landed") | owners(pond, "touches")
    async with pond.working("persistence", database_url=database.url):
        await whole(pond, database.url)


async def test_workers_that_add_to_the_same_hours_never_wait_in_a_circle(
    pond: Pond, database: Any, rng: random.Random
) -> None:
    pond.options |= {"partitions": 4}
    pond.partitions = 4
    tenants = [f"t{n}" for n in range(40)]
    async with pond.process("persistence", database_url=database.url) as worker:
        for _ in range(12):
            for partition in range(4):
                for tenant in rng.sample(tenants, 20):
                    touch(pond, 1, tenant=tenant, partition=partition)
            await until(lambda: not lag(pond, "touches"), "it has read them: the next go into other transactions")
        await until(lambda: is_written(pond), "everything is counted")
        assert await rows(database.url, "SELECT sum(hits) FROM hits") == [(12 * 4 * 20,)]
        assert worker.errors == ""


async def test_a_flushed_redis_leaves_what_was_written_and_it_goes_on(
    pond: Pond, database: Any, partitions: int
) -> None:
    async with pond.working("persistence", database_url=database.url):
        load(pond)
        await until(lambda: is_written(pond), "the first load is written")
        pond.redis.flushall()
        await until(lambda: all(pond.redis.exists(k.landed, k.touches) == 2 for k in pond.all_names()), "they are back")
        for number in range(5):
            land(pond, 1000 + number, entry=entry_of(1000 + number, epoch="5-0"))
        await until(lambda: is_written(pond), "the second load is written")
    assert await count(database.url, "answers") == ANSWERS + 5


@pytest.mark.every_postgresql
async def test_a_session_frozen_in_the_middle_of_a_message_keeps_its_locks_for_a_lease(
    pond: Pond, database: Any
) -> None:
    """PostgreSQL does not call it idle: it waits for the rest of what the client was sending."""
    named = {"application_name": "millpond-persistence"}
    frozen = await asyncpg.connect(database.url, server_settings=named)
    looking = await asyncpg.connect(database.url)
    never = asyncio.Event()

    async def unfinished() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    await frozen.execute("BEGIN; LOCK TABLE answers IN ACCESS EXCLUSIVE MODE")
    copying = asyncio.create_task(frozen.copy_to_table("experiments", source=unfinished()))
    try:
        reading = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND wait_event = 'ClientRead'"
        while not await looking.fetchval(reading):
            assert not copying.done()
            await asyncio.sleep(0.01)
        load(pond)
        async with pond.working("persistence", database_url=database.url):
            await whole(pond, database.url)
    finally:
        never.set()
        await asyncio.gather(copying, return_exceptions=True)
        frozen.terminate()
        await looking.close()


async def test_a_day_that_gets_its_partition_meanwhile_loses_nothing(pond: Pond, database: Any) -> None:
    at = int((time.time() - 20 * 86_400) * 1000)
    names = pond.all_names()[0]

    def old(stream: str, ms: int, *fields: bytes | str) -> None:
        pond.redis.execute_command("XADD", stream, f"{ms}-0", *fields)

    async with pond.working("persistence", database_url=database.url):
        old(names.landed, at, "key", key_of(1), "outcome", "stored", "call", call_of(), "entry", entry_of(1))
        await until(lambda: is_written(pond), "it lies in the default partition")
        attaching, looking = await asyncpg.connect(database.url), await asyncpg.connect(database.url)
        async with attaching.transaction():
            assert f"calls_{datetime.fromtimestamp(at / 1000, UTC):%Y%m%d}" in await attaching.fetchval(
                "SELECT ensure_partitions(2)"
            )
            old(names.landed, at + 1, "key", key_of(2), "outcome", "stored", "call", call_of(), "entry", entry_of(2))
            await wait_for_lock(looking)
        await until(lambda: is_written(pond), "it is written")
        await attaching.close()
        await looking.close()
    assert (await count(database.url, "calls"), await count(database.url, "answers"), pond.length("dead")) == (2, 2, 0)
