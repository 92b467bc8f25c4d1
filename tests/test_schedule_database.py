"""The scheduled jobs that tend PostgreSQL: each does what it says, and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from shared.postgres import EmbeddedPostgres
from shared.settings import Settings
from tests.conftest import Server
from tests.databases import Database
from tests.test_schedule import at_desk
from workers import housekeeping
from workers.desk import Desk
from workers.jobs import JOBS, perform

NOW = datetime.now(UTC)


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


async def test_partitions_are_there_a_week_ahead(desk: Desk, rows: asyncpg.Connection) -> None:
    last = f"calls_{NOW + timedelta(days=housekeeping.DAYS_AHEAD):%Y%m%d}"
    await rows.execute(f"DROP TABLE IF EXISTS {last}")
    assert last in (await done(desk, "partitions"))["created"]
    assert await rows.fetchval("SELECT to_regclass($1)", last)
    assert (await done(desk, "partitions"))["created"] == []


async def test_retention_drops_what_is_past_its_time_and_nothing_else(
    desk: Desk, rows: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "BATCH", 2)
    for n, days in enumerate((40, 30, 20, 11, 12, 9, 0, -5)):
        gone = NOW - timedelta(days=days)
        await rows.execute(
            """INSERT INTO answers (key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile,
               tenant, model, bytes, entry) VALUES ($1, 0, 0, 0, $2, $2, $2, $2, '{}', 'p', 't', 'm', 1, 'x')""",
            bytes([n]) * 16,
            gone,
        )
        await rows.execute(
            "INSERT INTO invalidations (partition, id, at, labels) VALUES (0, $1, $2, '{doc:1}')", f"{n}-0", gone
        )
    await rows.execute("INSERT INTO hits SELECT $1, 'l1', 'p', 't', 'm', '', '', 1, 0, 0, 0, 0, array_fill(0, '{15}')",
                       NOW - timedelta(days=20))  # fmt: skip
    await done(desk, "partitions")  # gives the day twenty days ago its partition
    result = await done(desk, "retention")
    assert (result["answers_deleted"], result["audit_rows_deleted"]) == (5, 5)
    assert f"hits_{NOW - timedelta(days=20):%Y%m%d}" in result["partitions_dropped"]
    assert await rows.fetchval("SELECT min(gone) FROM answers") == NOW - timedelta(days=9)
    assert await rows.fetchval("SELECT count(*) FROM invalidations") == 3
    assert (await done(desk, "retention"))["answers_deleted"] == 0


async def test_the_roll_up_keeps_the_top_of_each_past_hour(
    desk: Desk, rows: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "TOP_PER_HOUR", 3)
    hours = [NOW.replace(minute=0, second=0, microsecond=0) - timedelta(hours=h) for h in (0, 1, 2)]
    await rows.executemany(
        "INSERT INTO top_keys (hour, key, hits) VALUES ($1, $2, $3)",
        [(hour, bytes([n]) * 16, n) for hour in hours for n in range(8)],
    )
    assert (await done(desk, "roll_up"))["dropped"] == 10
    left = await rows.fetch("SELECT hour, count(*), min(hits) FROM top_keys GROUP BY hour ORDER BY hour DESC")
    assert [tuple(row)[1:] for row in left] == [(8, 0), (3, 5), (3, 5)]
    assert (await done(desk, "roll_up"))["dropped"] == 0


@pytest.mark.parametrize("name", ["partitions", "retention", "roll_up", "promotion_sweep"])
async def test_without_a_database_its_jobs_are_skipped(
    settings: Callable[..., Settings], server: Server, name: str
) -> None:
    async with at_desk(settings(l3=False)) as without:
        assert await done(without, name) == {"skipped": "no database"}


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
