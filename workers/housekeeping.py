"""Jobs that keep the deployment tidy: day partitions, retention, roll-ups, consumers of workers long gone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ResponseError

from shared import keys
from shared.keys import PartitionKeys
from shared.scripts import SCRIPTS
from workers.desk import Desk, Result

#: Partitions exist this many days ahead: a schedule that stands still for less is noticed by nobody.
DAYS_AHEAD = 7
#: Keys kept per hour in the list of the most asked.
TOP_PER_HOUR = 1000
#: Rows per transaction: locks are short, and what runs beside is not held up.
BATCH = 2000
#: Batches per run; what is left then is the next run's.
MOST_BATCHES = 500
#: A consumer silent for this long (seconds), and for ten leases, belongs to a worker that is gone.
SILENT = 60.0


async def partitions(desk: Desk) -> Result:
    """Create the day partitions of the next week."""
    pool = await desk.database()
    if pool is None:
        return desk.without_database()
    created = await pool.fetchval("SELECT ensure_partitions($1)", DAYS_AHEAD)
    return {"days_ahead": DAYS_AHEAD, "created": list(created)}


async def retention(desk: Desk) -> Result:
    """Drop history past its time; delete answers that ended before that, audit rows, and idle experiments."""
    pool = await desk.database()
    if pool is None:
        return desk.without_database()
    days = desk.settings.retention_days
    dropped = await pool.fetchval("SELECT drop_partitions($1)", days)
    # SKIP LOCKED: two runs at once share the work, and a row that is being rewritten is not waited for.
    answers = """
        DELETE FROM answers WHERE key IN (
            SELECT key FROM answers WHERE gone < now() - make_interval(days => $1)
            ORDER BY gone LIMIT $2 FOR UPDATE SKIP LOCKED)
    """
    audits = """
        DELETE FROM invalidations WHERE (partition, id) IN (
            SELECT partition, id FROM invalidations WHERE at < now() - make_interval(days => $1)
            LIMIT $2 FOR UPDATE SKIP LOCKED)
    """
    experiments = """
        DELETE FROM experiments WHERE (name, variant) IN (
            SELECT name, variant FROM experiments WHERE last_seen < now() - make_interval(days => $1)
            LIMIT $2 FOR UPDATE SKIP LOCKED)
    """
    return {
        "days": days,
        "partitions_dropped": list(dropped),
        "answers_deleted": await _in_batches(lambda: pool.execute(answers, days, BATCH)),
        "audit_rows_deleted": await _in_batches(lambda: pool.execute(audits, days, BATCH)),
        "experiments_deleted": await _in_batches(lambda: pool.execute(experiments, days, BATCH)),
    }


async def roll_up(desk: Desk) -> Result:
    """Keep the most asked keys of every hour that is over, and drop the long tail below them."""
    pool = await desk.database()
    if pool is None:
        return desk.without_database()
    hours = await pool.fetch(
        """
        SELECT hour FROM top_keys WHERE hour < date_trunc('hour', now()) AND hour >= now() - interval '2 days'
        GROUP BY hour HAVING count(*) > $1 ORDER BY hour
        """,
        TOP_PER_HOUR,
    )
    # Ties are broken by the key, so that a second run finds nothing more to do.
    statement = """
        DELETE FROM top_keys WHERE hour = $1 AND (hits, key) < (
            SELECT hits, key FROM top_keys WHERE hour = $1 ORDER BY hits DESC, key DESC OFFSET $2 LIMIT 1)
    """
    dropped = [_count(await pool.execute(statement, row[0], TOP_PER_HOUR - 1)) for row in hours]
    return {"kept_per_hour": TOP_PER_HOUR, "hours": len(hours), "dropped": sum(dropped)}


def _count(status: str) -> int:
    """Read a command's status, `DELETE 5`."""
    return int(status.rpartition(" ")[2])


async def _in_batches(batch: Callable[[], Awaitable[str]]) -> int:
    """Repeat a DELETE of at most BATCH rows until it deletes fewer; return how many it deleted."""
    total = 0
    for _ in range(MOST_BATCHES):
        count = _count(await batch())
        total += count
        if count < BATCH:
            break
    return total


async def dead_consumers(desk: Desk) -> Result:
    """Remove consumers whose worker is gone and who hold nothing; what they held is reclaimed by others first."""
    counts = {"consumers": 0, "dismissed": 0, "holding": 0}
    lease = max(desk.settings.lookup_lease, desk.settings.llm_lease, desk.settings.background_lease)
    idle_ms = max(SILENT, 10 * lease) * 1000
    for names in map(PartitionKeys, range(desk.partitions)):
        for stream in names.read_in_groups:
            for group in await _about(desk, ("XINFO", "GROUPS", stream)):
                await _dismiss(desk, stream, group[b"name"], idle_ms, counts)
    return dict(counts)


async def _dismiss(desk: Desk, stream: str, group: bytes, idle_ms: float, counts: dict[str, int]) -> None:
    found = await _about(desk, ("XINFO", "CONSUMERS", stream, group))
    silent = [one for one in found if one[b"idle"] > idle_ms]
    beats = await desk.link.send([("EXISTS", keys.worker(one[b"name"].decode())) for one in silent])
    gone = [one for one, alive in zip(silent, beats, strict=True) if not alive]
    calls = [SCRIPTS["dismiss"].call([stream], [group, one[b"name"]]) for one in gone if not one[b"pending"]]
    dismissed = sum(await desk.link.send(calls))
    counts["consumers"] += len(found)
    counts["dismissed"] += dismissed
    counts["holding"] += len(gone) - dismissed


async def _about(desk: Desk, command: tuple[str | bytes, ...]) -> list[dict[bytes, Any]]:
    (reply,) = await desk.link.post([command])
    if isinstance(reply, ResponseError):  # no such stream, or no such group: it vanished meanwhile
        if "no such key" in str(reply) or str(reply).startswith("NOGROUP"):
            return []
        raise reply
    return [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in reply]
