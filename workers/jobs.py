"""What the schedule runs: each job once per tick in the whole deployment, or by hand with `millpond schedule run`.

A job is idempotent, bounded in time, and safe beside another run of itself. What it did, or why it failed, is kept in
`mp:schedule:NAME` for a week.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import orjson
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared import keys
from shared.database import DATABASE_ERRORS, cannot_reach
from shared.errors import MillpondError, Unavailable
from shared.keys import PartitionKeys
from shared.messages import Rules
from workers import housekeeping, memory, orphans
from workers.desk import Desk, Result

log = logging.getLogger("millpond.schedule")

_KEEP_MS = 7 * 86_400_000
#: What is told of an error at most.
_LONGEST = 500


@dataclass(frozen=True, slots=True)
class Job:
    """One scheduled job. `when` are arq's cron fields (UTC), `every` says the same in words; `timeout` in seconds."""

    name: str
    what: str
    every: str
    when: Mapping[str, Any]
    run: Callable[[Desk], Awaitable[Result]]
    timeout: float = 300.0


async def _memory(desk: Desk) -> Result:
    return await memory.watch(desk.link, desk.settings)


async def _orphans(desk: Desk) -> Result:
    return dict(await orphans.audit(desk.link, desk.partitions, desk.settings))


async def _promotion_sweep(desk: Desk) -> Result:
    from workers.promotion import sweep

    pool = await desk.database()
    if pool is None:
        return desk.without_database()
    return dict(await sweep(desk.link, pool, desk.settings, desk.partitions))


async def _prune(desk: Desk) -> Result:
    from workers.prune import prune

    pool = await desk.database()
    counts = {"done": 0, "nothing": 0, "waiting": 0, "no-database": 0, "markers": 0}
    for names in map(PartitionKeys, range(desk.partitions)):
        pruned = await prune(desk.link, pool, names, older_than=desk.settings.marker_age)
        counts[pruned.state] += 1
        counts["markers"] += pruned.markers
    result: Result = {name: count for name, count in counts.items() if count or name == "markers"}
    if kept := counts["no-database"]:
        # Once that PostgreSQL is read again, nothing but the markers voids what lies in it.
        where = f"the answers of {kept} of {desk.partitions} partitions are in a PostgreSQL that"
        rest = f"; markers pruned in the others: {counts['markers']}" if kept < desk.partitions else ""
        if desk.settings.l3:
            raise Unavailable(
                f"{where} is not known here: set MILLPOND_DATABASE_URL as for their persistence worker{rest}"
            )
        result["skipped"] = (
            f"{where} MILLPOND_L3=false does without, and their markers stay with them: to have it back, unset "
            f"MILLPOND_L3, and set MILLPOND_DATABASE_URL or let `millpond up` start one{rest}"
        )
    return result


async def _warm_top(desk: Desk) -> Result:
    from shared.warming import Warmer, most_asked

    if not desk.settings.warm_top:
        return {"skipped": "MILLPOND_WARM_TOP says how many, and is 0"}
    pool = await desk.database()
    if pool is None:
        return desk.without_database()
    if await desk.link.call(("EXISTS", keys.PRESSURE)):
        return {"skipped": "Redis' memory is above its mark"}
    since = datetime.now(UTC) - timedelta(days=1)
    wishes, left_out = await most_asked(pool, since, desk.settings.warm_top, Rules.of(desk.settings))
    account = await Warmer(desk.link, desk.settings, desk.partitions, pool).run(wishes) if wishes else None
    told = ("warmed", "present", "restored", "failed")
    return {"left_out": left_out, "asked": len(wishes)} | {name: getattr(account, name, 0) for name in told}


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job(
            "memory",
            "watch Redis' memory; above its mark, tell the workers to spare it",
            "5 s",
            {"second": set(range(0, 60, 5))},
            _memory,
            timeout=5.0,
        ),
        Job(
            "orphans",
            "end flights whose fill is gone, and tell who waited for them",
            "minute",
            {"second": 20},
            _orphans,
            timeout=50.0,
        ),
        Job(
            "dead_consumers",
            "remove the consumers of workers long gone",
            "10 minutes",
            {"minute": set(range(3, 60, 10)), "second": 40},
            housekeeping.dead_consumers,
            timeout=60.0,
        ),
        Job(
            "promotion_sweep",
            "keep the most asked answers in Redis, and bring back those that left it",
            "10 minutes",
            {"minute": set(range(6, 60, 10)), "second": 10},
            _promotion_sweep,
        ),
        Job(
            "prune",
            "remove the markers of old invalidations, once nothing they void can come back",
            "hour",
            {"minute": 22, "second": 0},
            _prune,
            timeout=600.0,
        ),
        Job(
            "warm_top",
            "keep the most asked answers of the last day computed (setting `warm_top`)",
            "hour",
            {"minute": 52, "second": 0},
            _warm_top,
            timeout=1800.0,
        ),
        Job(
            "partitions",
            "create the day partitions of the next week",
            "hour",
            {"minute": 7, "second": 0},
            housekeeping.partitions,
        ),
        Job(
            "roll_up",
            "keep the most asked keys of each past hour, drop the tail",
            "hour",
            {"minute": 4, "second": 0},
            housekeeping.roll_up,
        ),
        Job(
            "retention",
            "drop history and answers past their time",
            "hour",
            {"minute": 37, "second": 0},
            housekeeping.retention,
            timeout=600.0,
        ),
    )
}


async def perform(desk: Desk, job: Job, by: Literal["schedule", "hand"]) -> Result:
    """Run one job and record what came of it; return the record. Its own failure is recorded, not raised.

    The record has `name`, `at` (when it began, ISO 8601), `seconds`, `by`, `ok`, and `result` or `error`.

    Raises:
        redis.ConnectionError, redis.TimeoutError: Redis cannot be reached, so nothing can be recorded either.
    """
    at, began = datetime.now(UTC), time.monotonic()
    said: Result
    bounds = asyncio.timeout(job.timeout)
    try:
        async with bounds:
            said = {"ok": True, "result": await job.run(desk)}
    except (RedisConnectionError, RedisTimeoutError):
        raise
    except Exception as error:
        expected = isinstance(error, MillpondError | TimeoutError | OSError)
        words = _words(error)
        if bounds.expired():
            words = f"not done within {job.timeout:g} s; `millpond doctor` says whether Redis and PostgreSQL answer"
        if by == "schedule" or not expected:  # who runs it by hand is told
            log.warning("%s failed: %s", job.name, words, exc_info=not expected)
        said = {"ok": False, "error": words}
    record = {
        "name": job.name,
        "at": at.isoformat(timespec="milliseconds"),
        "seconds": round(time.monotonic() - began, 3),
        "by": by,
        **said,
    }
    await desk.link.call(("SET", keys.schedule(job.name), orjson.dumps(record, default=str), "PX", _KEEP_MS))
    return record


def _words(error: BaseException) -> str:
    if isinstance(error, MillpondError):
        return error.message[:_LONGEST]
    if isinstance(error, DATABASE_ERRORS):
        if isinstance(error, OSError):
            return cannot_reach(error)[:_LONGEST]
        return f"PostgreSQL: {str(error)[:_LONGEST]}; `millpond doctor` says what to do"
    return f"{type(error).__name__}: {error}"[:_LONGEST]
