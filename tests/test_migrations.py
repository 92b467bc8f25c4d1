"""The schema: applied once however many start at once, refused when newer than the code, partitions by day."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import migrations
from shared import postgres
from shared.database import connect_pool
from shared.errors import ConfigError, MillpondError, Unavailable
from shared.touches import BOUNDS
from tests.databases import Database, run_sql

pytestmark = pytest.mark.every_postgresql
ROOT = Path(__file__).parent.parent
DAILY = ("applied", "calls", "hits", "top_keys")
TABLES = {"answers", *DAILY, "experiments", "floors", "invalidations", migrations.VERSION_TABLE}


def days(*offsets: int) -> list[str]:
    today = datetime.now(UTC).date()
    return [format(today + timedelta(days=offset), "%Y%m%d") for offset in offsets]


async def partitions(database: Database, table: str) -> list[str]:
    query = "SELECT c.relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid WHERE inhparent = $1::regclass"
    return sorted(str(row[0]).removeprefix(f"{table}_") for row in await database.fetch(query, table))


async def test_an_empty_database_gets_every_table_and_the_next_days(empty_database: Database) -> None:
    assert await migrations.current_async(empty_database.url) is None
    assert await migrations.migrate_async(empty_database.url) == migrations.KNOWN
    assert await migrations.current_async(empty_database.url) == migrations.KNOWN[-1]
    kinds = "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace "
    rows = await empty_database.fetch(kinds + "AND NOT relispartition")
    assert {row[0] for row in rows} == TABLES
    for table in DAILY:
        assert await partitions(empty_database, table) == [*days(-1, 0, 1, 2, 3), "default"]


async def test_a_second_migration_finds_nothing_to_do(database: Database) -> None:
    assert await migrations.migrate_async(database.url) == []


async def test_latencies_counted_in_coarser_buckets_keep_their_upper_bounds(database: Database) -> None:
    old = [1, *[0] * 9, 7, 3, 0, 0, 2]  # up to 1 ms, up to 2 s, up to 5 s, above 30 s
    await asyncio.to_thread(
        run_sql,
        database.url,
        f"UPDATE {migrations.VERSION_TABLE} SET version_num = '0001'",
        "ALTER TABLE hits DROP CONSTRAINT hits_histogram_check",
        "ALTER TABLE hits ADD CONSTRAINT hits_histogram_check CHECK (cardinality(histogram) = 15)",
        "INSERT INTO hits (hour, tier, profile, tenant, model, hits, histogram) "
        f"VALUES (now(), 'llm', 'p', 't', 'm', 13, ARRAY{old})",
    )
    assert "0002" in await migrations.migrate_async(database.url)
    (counted,) = await database.fetch("SELECT histogram FROM hits")
    counts = dict(zip((*BOUNDS, None), counted[0], strict=True))
    assert {bound: n for bound, n in counts.items() if n} == {1: 1, 2000: 7, 5000: 3, None: 2}


def test_of_many_processes_that_start_at_once_one_migrates(empty_database: Database) -> None:
    code = "import sys, migrations; sys.stdin.readline(); print(*migrations.migrate(sys.argv[1]))"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, empty_database.url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0].strip() for process in started)
    assert [process.returncode for process in started] == [0] * 4
    assert said == ["", "", "", " ".join(migrations.KNOWN)]


def test_a_database_newer_than_the_code_is_refused_and_left_alone(database: Database) -> None:
    run_sql(database.url, f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(ConfigError, match="is at 9999, this version of Millpond knows") as refusal:
        migrations.migrate(database.url)
    assert refusal.value.field == "database_url"
    assert migrations.current(database.url) == "9999"


def test_a_role_that_may_not_create_tables_is_told_what_to_do(empty_database: Database) -> None:
    role = f"mere_reader_{os.getpid()}"
    # the guest may connect, as everyone may, and create nothing
    run_sql(empty_database.url, f"DROP ROLE IF EXISTS {role}", f"CREATE ROLE {role} LOGIN PASSWORD 'guest'")
    try:
        user = empty_database.url.partition("//")[2].partition("@")[0]
        guest = empty_database.url.replace(f"//{user}@", f"//{role}:guest@", 1)
        with pytest.raises(ConfigError, match="grant it CREATE on schema public"):
            migrations.migrate(guest)
    finally:
        run_sql(empty_database.url, f"DROP ROLE {role}")


async def test_a_migration_whose_session_is_cut_changed_nothing_and_succeeds_the_next_time(
    empty_database: Database,
) -> None:
    holder = await empty_database.connect()
    await holder.execute("SELECT pg_advisory_lock($1)", migrations.ADVISORY_LOCK)
    waiting = asyncio.create_task(migrations.migrate_async(empty_database.url))
    cut = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'migrate' AND wait_event = 'advisory' AND datname = current_database()"
    )
    async with asyncio.timeout(20):
        while not await holder.fetch(cut):  # it does not wait for the lock yet
            await holder.execute("SELECT pg_sleep(0.01)")
        with pytest.raises(Unavailable):
            await waiting
    assert await migrations.current_async(empty_database.url) is None
    await holder.close()
    assert await migrations.migrate_async(empty_database.url) == migrations.KNOWN


async def test_a_step_that_is_refused_halfway_leaves_nothing_behind(empty_database: Database) -> None:
    connection = await empty_database.connect()
    await connection.execute("CREATE TABLE hits (mine int)")
    with pytest.raises(MillpondError, match='nothing was changed: relation "hits" already exists'):
        await migrations.migrate_async(empty_database.url)
    assert await empty_database.value("SELECT to_regclass('answers')") is None
    await connection.execute("DROP TABLE hits")
    await connection.close()
    assert await migrations.migrate_async(empty_database.url) == migrations.KNOWN


@pytest.mark.parametrize("url", ["postgresql://127.0.0.1:1/x", "postgresql:///x?host=/nowhere"])
def test_a_server_that_is_away_is_unavailable(url: str, database_kind: str) -> None:
    with pytest.raises(Unavailable, match="millpond doctor"):
        migrations.migrate(url)


async def test_rows_that_came_before_their_partition_are_moved_into_it(database: Database) -> None:
    at = datetime.now(UTC) + timedelta(days=9)
    connection = await database.connect()
    for moment in (at, at + timedelta(days=1)):
        await connection.execute("INSERT INTO applied VALUES ($1, 'touches', '1-1')", moment)
    assert await database.value("SELECT count(*) FROM applied_default") == 2
    created = await connection.fetchval("SELECT ensure_partitions(3)")
    assert created == [f"applied_{day}" for day in days(9, 10)]
    assert await database.value("SELECT count(*) FROM applied_default") == 0
    assert await database.value(f"SELECT at FROM applied_{days(9)[0]}") == at
    assert await database.value("SELECT ensure_partitions(3)") == []
    await connection.close()


async def test_retention_drops_whole_days_and_what_only_guards_against_repeats_after_two(database: Database) -> None:
    now = datetime.now(UTC)
    connection = await database.connect()
    for age in (2, 3, 7, 8):
        await connection.execute("INSERT INTO applied VALUES ($1, 's', '1-1')", now - timedelta(days=age))
        await connection.execute("INSERT INTO top_keys VALUES ($1, 'k', 1)", now - timedelta(days=age))
    await connection.execute("SELECT ensure_partitions(0)")
    dropped = await connection.fetchval("SELECT drop_partitions(7)")
    assert dropped == [f"top_keys_{days(-8)[0]}", *(f"applied_{day}" for day in days(-8, -7, -3))]
    assert await database.value("SELECT count(*) FROM top_keys") == 3
    await connection.close()


async def test_a_partition_in_use_is_dropped_the_next_time(database: Database) -> None:
    old = datetime.now(UTC) - timedelta(days=40)
    reader, connection = await database.connect(), await database.connect()
    await connection.execute("INSERT INTO top_keys VALUES ($1, 'k', 1)", old)
    await connection.execute("SELECT ensure_partitions(0)")
    async with reader.transaction():
        await reader.execute("SELECT * FROM top_keys")
        assert await connection.fetchval("SELECT drop_partitions(30)") == []
    assert await connection.fetchval("SELECT drop_partitions(30)") == [f"top_keys_{days(-40)[0]}"]
    await reader.close()
    await connection.close()


async def test_partitions_appear_while_others_write(database: Database) -> None:
    """A writer in the middle of its transaction does not hold up the creation of tomorrow's partition."""
    writer, connection = await database.connect(), await database.connect()
    async with writer.transaction():
        await writer.execute("INSERT INTO applied VALUES (now(), 's', '1-1')")
        async with asyncio.timeout(10):
            assert len(await connection.fetchval("SELECT ensure_partitions(4)")) == len(DAILY)
    await writer.close()
    await connection.close()


async def test_a_pool_reads_and_copies_jsonb_as_values(database: Database) -> None:
    async with (
        await connect_pool(database.url, name="a-test", statement_timeout="5000") as pool,
        pool.acquire() as connection,
    ):
        await connection.execute("CREATE TEMPORARY TABLE notes (body jsonb)")
        await connection.copy_records_to_table("notes", records=[({"a": [1, "é"]},)])
        assert await connection.fetchval("SELECT body FROM notes") == {"a": [1, "é"]}
        assert await connection.fetchval("SHOW application_name") == "a-test"


async def test_a_pool_is_made_while_the_server_is_away_and_works_once_it_is_back(
    own_database: postgres.EmbeddedPostgres,
) -> None:
    own_database.kill()
    async with await connect_pool(own_database.url) as pool:
        with pytest.raises(OSError):
            await pool.fetchval("SELECT 1")
        own_database.restart()
        assert await pool.fetchval("SELECT 1") == 1
