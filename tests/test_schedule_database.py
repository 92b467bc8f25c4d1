"""The scheduled jobs that tend PostgreSQL: each does what it says, and no more."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from shared import keys
from shared.keys import PartitionKeys
from shared.link import Link
from shared.messages import Rules
from shared.postgres import EmbeddedPostgres
from shared.scripts import SCRIPTS
from shared.settings import Settings
from tests import test_warm
from tests.command_line import run
from tests.conftest import Server
from tests.databases import Database
from tests.test_schedule import at_desk
from workers import housekeeping
from workers.desk import Desk
from workers.jobs import JOBS, perform

link, pool, rules = test_warm.link, test_warm.pool, test_warm.rules

NAMES = PartitionKeys(0)
#: Longer than a test of this module takes.
_A_WHILE = timedelta(seconds=10)


@pytest.fixture
def now() -> datetime:
    """The time, in an hour that does not end within the test."""
    while (moment := datetime.now(UTC)).hour != (moment + _A_WHILE).hour:
        time.sleep(0.1)
    return moment


@pytest.fixture
async def desk(settings: Callable[..., Settings], server: Server, database: Database) -> AsyncIterator[Desk]:
    """What a job works with, PostgreSQL included."""
    async with at_desk(settings(retention_days=10)) as ready:
        yield ready


@pytest.fixture
async def rows(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """A connection to look at, or prepare, what lies in PostgreSQL."""
    connection = await asyncpg.connect(database.url)
    yield connection
    await connection.close()


async def done(desk: Desk, name: str) -> dict[str, Any]:
    """Run a job; return what it did."""
    record = await perform(desk, JOBS[name], "hand")
    assert record["ok"], record
    result: dict[str, Any] = record["result"]
    return result


async def test_partitions_are_there_a_week_ahead(desk: Desk, rows: asyncpg.Connection, now: datetime) -> None:
    last = f"calls_{now + timedelta(days=housekeeping.DAYS_AHEAD):%Y%m%d}"
    await rows.execute(f"DROP TABLE IF EXISTS {last}")
    assert last in (await done(desk, "partitions"))["created"]
    assert await rows.fetchval("SELECT to_regclass($1)", last)
    assert (await done(desk, "partitions"))["created"] == []


async def test_retention_drops_what_is_past_its_time_and_nothing_else(
    desk: Desk, rows: asyncpg.Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "BATCH", 2)
    for n, days in enumerate((40, 30, 20, 11, 12, 9, 0, -5)):
        gone = now - timedelta(days=days)
        await rows.execute(
            """INSERT INTO answers (key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile,
               tenant, model, bytes, entry) VALUES ($1, 0, 0, 0, $2, $2, $2, $2, '{}', 'p', 't', 'm', 1, 'x')""",
            bytes([n]) * 16,
            gone,
        )
        await rows.execute(
            "INSERT INTO invalidations (partition, id, at, labels) VALUES (0, $1, $2, '{doc:1}')", f"{n}-0", gone
        )
        await rows.execute("INSERT INTO experiments VALUES ('e', $1, $2, $2)", str(n), gone)
    await rows.execute("INSERT INTO hits SELECT $1, 'l1', 'p', 't', 'm', '', '', 1, 0, 0, 0, 0, array_fill(0, '{46}')",
                       now - timedelta(days=20))  # fmt: skip
    await done(desk, "partitions")  # gives the day twenty days ago its partition
    result = await done(desk, "retention")
    assert (result["answers_deleted"], result["audit_rows_deleted"]) == (5, 5)
    assert result["experiments_deleted"] == 5
    assert f"hits_{now - timedelta(days=20):%Y%m%d}" in result["partitions_dropped"]
    assert await rows.fetchval("SELECT min(gone) FROM answers") == now - timedelta(days=9)
    assert await rows.fetchval("SELECT count(*) FROM invalidations") == 3
    assert (await done(desk, "retention"))["answers_deleted"] == 0


async def test_the_roll_up_keeps_the_top_of_each_past_hour(
    desk: Desk, rows: asyncpg.Connection, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "TOP_PER_HOUR", 3)
    hours = [now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=h) for h in (0, 1, 2)]
    await rows.executemany(
        "INSERT INTO top_keys (hour, key, hits) VALUES ($1, $2, $3)",
        [(hour, bytes([n]) * 16, n) for hour in hours for n in range(8)],
    )
    assert (await done(desk, "roll_up"))["dropped"] == 10
    left = await rows.fetch("SELECT hour, count(*), min(hits) FROM top_keys GROUP BY hour ORDER BY hour DESC")
    assert [tuple(row)[1:] for row in left] == [(8, 0), (3, 5), (3, 5)]
    assert (await done(desk, "roll_up"))["dropped"] == 0


async def test_what_is_asked_most_is_kept_warm(
    settings: Callable[..., Settings], link: Link, pool: asyncpg.Pool, rules: Rules
) -> None:
    often, seldom = test_warm.wishes(2, rules)
    for hits, wish in ((9, often), (1, seldom)):
        await test_warm.keep(pool, wish, await test_warm.land(link, wish), hits=hits, prompt=wish.body)
        await link.call(("DEL", NAMES.entry(wish.question.key)))
    async with at_desk(settings()) as off:
        assert "skipped" in await done(off, "warm_top")
    async with at_desk(settings(warm_top=1)) as desk:
        await link.call(("SET", keys.PRESSURE, "1", "PX", 60_000))
        assert "skipped" in await done(desk, "warm_top")
        await link.call(("DEL", keys.PRESSURE))
        result = await done(desk, "warm_top")
    assert (result["asked"], result["restored"]) == (1, 1)
    present = [await link.call(("EXISTS", NAMES.entry(wish.question.key))) for wish in (often, seldom)]
    assert present == [1, 0]


async def test_old_markers_are_pruned(settings: Callable[..., Settings], server: Server, link: Link) -> None:
    marked = await link.call(SCRIPTS["invalidate"].call([NAMES.invalidations, NAMES.tags], ["test", 100, "doc:1"]))
    assert marked
    async with at_desk(settings(l3=False)) as desk:
        assert await done(desk, "prune") == {"nothing": 1, "markers": 0}
    async with at_desk(settings(l3=False, marker_age=0.1)) as desk:
        await asyncio.sleep(0.15)  # the marker's age is the test's subject
        assert (await done(desk, "prune"))["markers"] >= 1
    assert await link.call(("HGET", NAMES.tags, "doc:1")) is None


@pytest.mark.parametrize("name", ["partitions", "retention", "roll_up", "promotion_sweep"])
async def test_without_a_database_its_jobs_are_skipped(
    settings: Callable[..., Settings], server: Server, name: str
) -> None:
    async with at_desk(settings(l3=False)) as without:
        assert await done(without, name) == {"skipped": "MILLPOND_L3=false does without PostgreSQL"}


@pytest.mark.parametrize("name", ["partitions", "retention", "roll_up", "promotion_sweep", "warm_top"])
async def test_by_hand_a_job_fails_for_want_of_a_database_and_says_what_to_do(
    settings: Callable[..., Settings], server: Server, name: str
) -> None:
    chosen = settings(warm_top=1)
    async with at_desk(chosen) as unattended:
        assert "MILLPOND_DATABASE_URL" in (await done(unattended, name))["skipped"]
    async with at_desk(chosen, by_hand=True) as desk:
        record = await perform(desk, JOBS[name], "hand")
    assert (record["ok"], "MILLPOND_DATABASE_URL" in record["error"]) == (False, True)


@pytest.mark.parametrize("configured", [False, True], ids=["embedded", "configured"])
def test_a_job_by_hand_says_that_postgresql_is_silent(
    server: Server, own_database: EmbeddedPostgres, configured: bool
) -> None:
    named = {"database_url": own_database.url} if configured else {}
    assert run("schedule", "run", "retention", url=server.url, data_dir=own_database.data_dir, **named).returncode == 0
    os.kill(_postmaster(own_database), signal.SIGSTOP)  # ends with SIGCONT, as the fixture stops it
    for job in ("retention",) if configured else ("retention", "prune"):  # a prune with nothing to do asks nobody
        silent = run("schedule", "run", job, url=server.url, data_dir=own_database.data_dir, **named)
        assert (silent.returncode, "PostgreSQL" in silent.stdout, "millpond " in silent.stdout) == (1, True, True), (
            silent
        )


def _postmaster(database: EmbeddedPostgres) -> int:
    return int((database.data / "data" / "postmaster.pid").read_text().splitlines()[0])


async def test_pruning_fails_where_the_database_that_others_write_to_is_not_known(
    settings: Callable[..., Settings], server: Server, link: Link
) -> None:
    await link.call(("XGROUP", "CREATE", NAMES.landed, keys.PERSISTENCE_GROUP, "0", "MKSTREAM"))
    async with at_desk(settings()) as desk:
        record = await perform(desk, JOBS["prune"], "schedule")
    assert (record["ok"], "MILLPOND_DATABASE_URL" in record["error"]) == (False, True)


@pytest.mark.parametrize("l3", [True, False])
async def test_pruning_keeps_the_markers_of_answers_in_a_database_done_without(
    settings: Callable[..., Settings], server: Server, link: Link, l3: bool
) -> None:
    for names in (NAMES, other := PartitionKeys(1)):
        await link.call(SCRIPTS["invalidate"].call([names.invalidations, names.tags], ["test", 100, "doc:1"]))
    await link.call(("XGROUP", "CREATE", NAMES.landed, keys.PERSISTENCE_GROUP, "0", "MKSTREAM"))
    async with at_desk(settings(l3=l3, marker_age=0.1), partitions=2) as desk:
        await asyncio.sleep(0.15)  # the marker's age is the test's subject
        record = await perform(desk, JOBS["prune"], "schedule")
    assert record["ok"] is not l3
    said = record["error"] if l3 else record["result"]["skipped"]
    assert "1 of 2 partitions" in said
    assert said.endswith("markers pruned in the others: 1")
    if not l3:
        assert "unset MILLPOND_L3" in said
        assert {name: record["result"][name] for name in ("done", "no-database", "markers")} == {
            "done": 1, "no-database": 1, "markers": 1,
        }  # fmt: skip
    assert await link.call(("HGET", NAMES.tags, "doc:1")) is not None
    assert await link.call(("HGET", other.tags, "doc:1")) is None


async def test_a_database_that_is_away_is_told_and_found_again(
    settings: Callable[..., Settings], server: Server, own_database: EmbeddedPostgres
) -> None:
    async with at_desk(settings()) as desk:
        await done(desk, "partitions")
        own_database.kill()
        record = await perform(desk, JOBS["partitions"], "hand")
        assert (record["ok"], "PostgreSQL" in record["error"]) == (False, True)
        own_database.restart()
        await done(desk, "partitions")
