"""The schedule worker: runs the jobs of workers/jobs.py at their times, by arq.

Any number of them may run: arq's cron jobs are unique, so that each tick's job runs once in the whole deployment. Jobs
and their results are JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson
from arq.connections import ArqRedis
from arq.cron import CronJob, cron, next_cron
from arq.worker import Worker
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import RedisError

from shared import keys
from shared.link import LINK_ERRORS
from shared.settings import Settings
from workers import memory
from workers.crew import Crew
from workers.desk import Desk, Result
from workers.jobs import JOBS, Job, perform
from workers.runtime import run_alone

log = logging.getLogger("millpond.schedule")

_POLL = 0.5
_BACKOFF = (0.5, 10.0)
_SOCKET_TIMEOUT = 10.0
#: A tick is known to be done for so long (seconds): a worker that comes late to it does not begin it again.
_REMEMBERED = 600


async def run(settings: Settings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Run a schedule worker until `stop` is set; jobs under way may finish first.

    Raises:
        ConfigError: the deployment was born otherwise than this process is configured.
        Unavailable: no server answers.
    """
    logging.getLogger("arq").setLevel(logging.CRITICAL)  # what it would say of jobs that fail, `perform` says
    await run_alone("schedule", settings, stop, on_ready, work)


async def work(
    crew: Crew, stop: asyncio.Event, ready: Callable[[], None], jobs: Iterable[Job] = tuple(JOBS.values())
) -> None:
    """Keep these jobs' times until `stop` is set; survive every loss of connection on the way."""
    desk = Desk(crew.url, crew.settings, crew.partitions)
    pause = _BACKOFF[0]
    told = False

    def once() -> None:
        nonlocal told, pause
        pause = _BACKOFF[0]
        if not told:
            told = True
            ready()

    try:
        while not stop.is_set():
            try:
                await _keep_times(desk, stop, once, jobs)
            except (RedisError, OSError) as error:
                log.warning("%s: the schedule was interrupted (%s); trying again", crew.name, error)
                # A server that is full refuses arq's own writes: the relief must not end for that.
                with contextlib.suppress(RedisError, *LINK_ERRORS):
                    await memory.watch(desk.link, desk.settings)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause * random.uniform(0.5, 1.5)):
                        await stop.wait()
                pause = min(pause * 2, _BACKOFF[1])
    finally:
        await desk.close()


def cron_job(job: Job, perform_it: Callable[[Job], Awaitable[Result]]) -> CronJob:
    """Return a job as arq knows it."""

    async def run_it(ctx: dict[Any, Any], *args: Any, **kwargs: Any) -> Result | None:
        try:
            return await perform_it(job)
        except LINK_ERRORS:
            return None  # arq loses its own connection then, and says so

    # A failed run is made good by the next: nothing is tried twice.
    return cron(
        run_it, name=job.name, unique=True, max_tries=1, timeout=job.timeout + 5, keep_result=_REMEMBERED, **job.when
    )


def next_time(job: Job) -> datetime:
    """Return when a job is due next."""
    return next_cron(datetime.now(UTC), **({"second": 0} | dict(job.when)))


async def _keep_times(desk: Desk, stop: asyncio.Event, ready: Callable[[], None], jobs: Iterable[Job]) -> None:
    pool = ConnectionPool.from_url(
        desk.url,
        client_name="millpond-schedule-arq",
        socket_connect_timeout=_SOCKET_TIMEOUT,
        socket_timeout=_SOCKET_TIMEOUT,
    )
    redis = ArqRedis(pool, job_serializer=_dumps, job_deserializer=orjson.loads)

    async def started(ctx: dict[Any, Any]) -> None:
        ready()

    timekeeper = Worker(
        cron_jobs=[cron_job(job, partial(perform, desk, by="schedule")) for job in jobs],
        queue_name=keys.SCHEDULE_PREFIX,
        health_check_key=f"{keys.SCHEDULE_PREFIX}:health",
        health_check_interval=60,
        redis_pool=redis,
        on_startup=started,
        handle_signals=False,
        retry_jobs=False,
        poll_delay=_POLL,
        job_serializer=_dumps,
        job_deserializer=orjson.loads,
        timezone=UTC,
        log_results=False,
    )
    main = asyncio.create_task(timekeeper.async_run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({main, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # Asked to end in its own time, after its jobs: cancelled, arq may lose a step, and redis-py the cancellation.
        timekeeper.burst, timekeeper.max_burst_jobs = True, 0
        await asyncio.wait({main}, timeout=desk.settings.drain_timeout + 2 * _POLL)
    finally:
        stopping.cancel()
        await _end(timekeeper, main)
        await redis.aclose(close_connection_pool=True)
    if not main.cancelled() and (error := main.exception()) is not None:
        raise error


async def _end(timekeeper: Worker, main: asyncio.Task[None]) -> None:
    # The jobs are cancelled and not the tasks around them, which then still tell Redis: that step is shielded, and
    # would be left to itself.
    for job in timekeeper.job_tasks.values():
        job.cancel()
    ending = {main, *timekeeper.tasks.values()}
    await asyncio.wait(ending, timeout=_SOCKET_TIMEOUT + 2)
    while waiting := [task for task in ending if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=_POLL)
    await asyncio.gather(*ending, return_exceptions=True)


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, default=str)
