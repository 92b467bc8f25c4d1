"""The schedule: each job does what it says, once per tick, and survives what may happen to it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from shared import keys
from shared.deployment import settle
from shared.embedded import EmbeddedRedis
from shared.errors import Unavailable
from shared.keys import PartitionKeys
from shared.link import Link
from shared.settings import Settings
from tests import faults_support
from tests.command_line import await_that, run, run_json
from tests.conftest import Server
from tests.faults_support import Pond, Raw, until
from tests.processes import start_worker
from workers import housekeeping, memory, orphans, schedule
from workers.crew import Crew
from workers.desk import Desk, Result
from workers.jobs import JOBS, Job, perform

pond = faults_support.pond
own_pond = faults_support.own_pond

EACH_SECOND = {"second": set(range(60))}
MEGABYTE = 1 << 20


def job(run: Callable[[Desk], Any], name: str = "tried", timeout: float = 5.0) -> Job:
    """Return a job that is due every second."""
    return Job(name, "for a test", "second", EACH_SECOND, run, timeout)


def noted(ran: list[datetime]) -> Callable[[Desk], Any]:
    """Return what a job does that says when it ran."""

    async def tick(_: Desk) -> Result:
        ran.append(datetime.now(UTC))
        return {}

    return tick


@asynccontextmanager
async def scheduling(settings: Settings, *jobs: Job, name: str = "schedule-test") -> AsyncIterator[None]:
    """Run a schedule worker in this process, that knows these jobs only."""
    assert settings.redis_url is not None
    crew = Crew("schedule", settings, settings.redis_url.get_secret_value(), 1, name)
    stop, ready = asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(schedule.work(crew, stop, ready.set, jobs))
    try:
        async with asyncio.timeout(20):
            await ready.wait()
        yield
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await running


@asynccontextmanager
async def at_desk(settings: Settings, partitions: int = 1, *, by_hand: bool = False) -> AsyncIterator[Desk]:
    """Yield what a job works with."""
    assert settings.redis_url is not None
    desk = Desk(settings.redis_url.get_secret_value(), settings, partitions, by_hand=by_hand)
    try:
        yield desk
    finally:
        await desk.close()


async def test_two_schedule_workers_run_each_tick_once(settings: Callable[..., Settings], server: Server) -> None:
    ran: list[tuple[str, int]] = []

    def told_by(worker: str) -> Job:
        async def tick(_: Desk) -> Result:
            ran.append((worker, int(datetime.now(UTC).timestamp() + 0.3)))
            return {}

        return job(tick)

    async with (
        scheduling(settings(), told_by("first"), name="first"),
        scheduling(settings(), told_by("second"), name="second"),
    ):
        await until(lambda: len(ran) >= 4, "four ticks were run")
    assert max(Counter(second for _, second in ran).values()) == 1, ran


async def test_a_tick_that_was_run_is_not_run_by_a_worker_that_comes_late_to_it(
    settings: Callable[..., Settings], server: Server
) -> None:
    ran: list[datetime] = []
    async with scheduling(settings(), job(noted(ran))):
        await until(lambda: ran, "a tick was run")
    with server.connect() as redis:
        (result, *_) = redis.scan_iter("arq:result:*")
        assert redis.pttl(result) > 60_000


async def test_what_a_job_did_or_why_it_failed_is_recorded(settings: Callable[..., Settings], server: Server) -> None:
    async def good(_: Desk) -> Result:
        return {"done": 3}

    async def bad(_: Desk) -> Result:
        raise Unavailable("nobody is there")

    async def slow(_: Desk) -> Result:
        await asyncio.Event().wait()
        return {}

    async with at_desk(settings()) as desk:
        await perform(desk, job(good, "good"), "hand")
        await perform(desk, job(bad, "bad"), "hand")
        await perform(desk, job(slow, "slow", timeout=0.05), "hand")
    with server.connect() as redis:
        records = [orjson.loads(redis.get(keys.schedule(name)) or b"{}") for name in ("good", "bad", "slow")]
        assert 0 < redis.pttl(keys.schedule("good")) <= 7 * 86_400_000
    assert [(r["ok"], r.get("result"), r.get("error")) for r in records] == [
        (True, {"done": 3}, None),
        (False, None, "nobody is there"),
        (False, None, "not done within 0.05 s; `millpond doctor` says whether Redis and PostgreSQL answer"),
    ]


async def test_the_schedule_goes_on_after_redis_was_restarted(
    settings: Callable[..., Settings], own_server: EmbeddedRedis
) -> None:
    ran: list[datetime] = []
    async with scheduling(settings(), job(noted(ran))):
        await until(lambda: ran, "a tick was run")
        await asyncio.to_thread(own_server.kill)
        await asyncio.to_thread(own_server.restart)
        ran.clear()
        await until(lambda: ran, "a tick was run after the restart", timeout=30)


def test_when_a_schedule_worker_is_killed_the_other_goes_on(server: Server) -> None:
    with (
        start_worker("schedule", server.url, l3=False) as first,
        start_worker("schedule", server.url, l3=False) as second,
    ):
        first.sigkill()
        killed = datetime.now(UTC)
        with server.connect() as redis:

            def run_since() -> bool:
                record = redis.get(keys.schedule("memory"))
                return record is not None and datetime.fromisoformat(orjson.loads(record)["at"]) > killed

            await_that(run_since, seconds=20)
        assert second.terminate() == 0, second.report()


def test_a_worker_touches_its_heartbeat_file_while_it_reaches_redis(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    with start_worker("lookup", server.url, heartbeat_file=file) as worker:
        await_that(file.exists)
        before = file.stat().st_mtime_ns
        await_that(lambda: file.stat().st_mtime_ns > before)
        worker.sigstop()
        frozen = file.stat().st_mtime_ns
        worker.sigcont()
        await_that(lambda: file.stat().st_mtime_ns > frozen)
        assert worker.terminate() == 0


async def test_a_stopped_worker_lets_its_job_finish(settings: Callable[..., Settings], server: Server) -> None:
    began, goes_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def long(_: Desk) -> Result:
        began.set()
        await goes_on.wait()
        ended.set()
        return {}

    async with scheduling(settings(), job(long)):
        async with asyncio.timeout(20):
            await began.wait()
        # No sooner than it was told to stop, and what would end the job at once has had its turns.
        asyncio.get_running_loop().call_later(0.1, goes_on.set)
    assert ended.is_set()


# memory


async def test_pressure_stands_while_memory_is_above_its_mark(
    settings: Callable[..., Settings], own_server: EmbeddedRedis, own_pond: Pond
) -> None:
    redis = own_pond.redis
    used = int(redis.info("memory")["used_memory"])
    limit = used + 96 * MEGABYTE
    redis.config_set("maxmemory", limit)
    async with at_desk(settings(memory_mark=(used + 12 * MEGABYTE) / limit)) as desk:
        assert (await JOBS["memory"].run(desk))["pressure"] is False
        assert not redis.exists(keys.PRESSURE)
        redis.set("fill", b"x" * 16 * MEGABYTE, px=60_000)
        assert (await JOBS["memory"].run(desk))["pressure"] is True
        assert 0 < redis.pttl(keys.PRESSURE) <= memory.PRESSURE_MS
        assert (await JOBS["memory"].run(desk))["pressure"] is True
        assert own_pond.stat("memory_alerts") == 1
        redis.delete("fill")
        redis.close()  # and with it the buffer of its connection
        await until(lambda: int(redis.info("memory")["used_memory"]) < used + 4 * MEGABYTE, "the memory is freed")
        assert (await JOBS["memory"].run(desk))["pressure"] is False
        assert not redis.exists(keys.PRESSURE)


async def test_a_limit_of_our_own_counts_where_redis_has_none(
    settings: Callable[..., Settings], server: Server
) -> None:
    async with at_desk(settings()) as desk:
        assert (await memory.watch(desk.link, settings()))["limit"] is None
        seen = await memory.watch(desk.link, settings(memory_limit=1000))
        assert (seen["pressure"], seen["limit"]) == (True, 1000)


async def test_relief_goes_on_while_a_full_redis_refuses_every_write(
    settings: Callable[..., Settings], own_server: EmbeddedRedis, own_pond: Pond
) -> None:
    redis = own_pond.redis
    redis.config_set("maxmemory", 64 * MEGABYTE)
    async with scheduling(settings(memory_mark=0.001), replace(JOBS["memory"], when=EACH_SECOND)):
        await until(lambda: redis.exists(keys.PRESSURE), "pressure was told")
        redis.config_set("maxmemory", 1)
        redis.pexpire(keys.PRESSURE, 9_000)
        await until(lambda: redis.pttl(keys.PRESSURE) > 9_000, "it was renewed while nothing can be written")
        redis.config_set("maxmemory", 0)


# orphans


async def _audit(pond: Pond) -> Result:
    async with at_desk(pond.settings, pond.partitions) as desk:
        return await JOBS["orphans"].run(desk)


async def test_a_flight_whose_fill_is_gone_ends_and_its_waiters_are_told(pond: Pond) -> None:
    names = pond.names("Lost?")
    async with pond.client() as client:
        async with pond.working("lookup"):
            asked = [asyncio.create_task(client.ask("Lost?")) for _ in range(3)]
            await until(lambda: pond.length("fills") == 1 and pond.found("{mp:*}:waiters:*"), "the flight began")
            assert (await _audit(pond))["flights_ended"] == 0
            pond.redis.xtrim(names.fills, maxlen=0)
            assert await _audit(pond) == {"flights": 1, "flights_ended": 1, "waiters_told": 3}
            told = await faults_support.outcomes(asked)
            assert [type(one) for one in told] == [Unavailable] * 3
            assert await _audit(pond) == {"flights": 0, "flights_ended": 0, "waiters_told": 0}
        async with pond.working("lookup", "llm"):
            assert (await client.ask("Lost?")).tier == "llm"
            await pond.settled()


async def test_a_flight_that_is_computed_or_refreshed_is_left_alone(pond: Pond) -> None:
    names = pond.names("Slow?")
    async with pond.client() as client, pond.working("lookup"):
        async with pond.working("llm", simulated_first_token=1.0):
            asked = asyncio.create_task(client.ask("Slow?"))
            await until(lambda: pond.pending("fills") == 1, "it is being computed")
            assert (await _audit(pond))["flights_ended"] == 0
            assert (await asked).tier == "llm"
            await pond.settled()
        token = "waits-among-the-refreshes"
        pond.redis.hset(names.flight("k"), "token", token)
        pond.redis.pexpire(names.flight("k"), 60_000)
        fill = pond.redis.xadd(names.refreshes, {"key": "k", "token": token})
        assert (await _audit(pond))["flights_ended"] == 0
        pond.redis.xdel(names.refreshes, fill)
        assert (await _audit(pond))["flights_ended"] == 1


async def test_a_flight_that_an_application_leads_has_no_fill_and_is_left_alone(pond: Pond) -> None:
    raw = [Raw(pond, name) for name in ("leads", "waits")]
    async with pond.working("lookup"):
        for one in raw:
            one.publish("r", "Led?", cache=orjson.dumps({"lead": True}))
        await until(lambda: any("lead" in one for one in raw[0].replies()), "one is elected")
        await until(lambda: pond.found("{mp:*}:waiters:*"), "the other waits")
        assert await _audit(pond) == {"flights": 1, "flights_ended": 0, "waiters_told": 0}
        pond.redis.delete(pond.names("Led?").flight(pond.key("Led?")))  # as if its lease had run out
        assert await _audit(pond) == {"flights": 0, "flights_ended": 0, "waiters_told": 0}


async def test_a_refresh_that_becomes_a_fill_while_the_audit_looks_is_met(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, read = PartitionKeys(0), orphans._tokens
    pond.redis.hset(names.flight("k"), mapping={"token": "t"})
    pond.redis.pexpire(names.flight("k"), 60_000)
    pond.redis.xadd(names.refreshes, {"key": "k", "token": "t"})
    looks: list[set[str]] = []

    async def read_then_move(link: Link, stream: str) -> set[str]:
        looks.append(await read(link, stream))
        if len(looks) == 1:  # as join moves it, for somebody who waits now
            pond.redis.delete(names.refreshes)
            pond.redis.xadd(names.fills, {"key": "k", "token": "t"})
        return looks[-1]

    monkeypatch.setattr(orphans, "_tokens", read_then_move)
    assert (await _audit(pond))["flights_ended"] == 0
    pond.redis.delete(names.fills)
    assert (await _audit(pond))["flights_ended"] == 1


# consumers


async def test_consumers_of_dead_workers_go_unless_they_hold_something(
    settings: Callable[..., Settings], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "SILENT", 0.1)
    quick = settings(lookup_lease=0.2, llm_lease=0.2, background_lease=0.2)
    stream = PartitionKeys(0).requests
    with server.connect() as redis:
        redis.xgroup_create(stream, "lookup", "0", mkstream=True)
        for name in ("holds", "gone", "alive"):
            message = redis.xadd(stream, {"id": "1"})
            redis.xreadgroup("lookup", name, {stream: ">"}, count=1)
            if name != "holds":
                redis.xack(stream, "lookup", message)
        redis.set(keys.worker("alive"), "{}", px=60_000)

        def names() -> set[bytes]:
            return {one["name"] for one in redis.xinfo_consumers(stream, "lookup")}

        async with at_desk(quick) as desk:
            assert (await JOBS["dead_consumers"].run(desk))["dismissed"] == 0
            await until(lambda: all(one["idle"] > 2100 for one in redis.xinfo_consumers(stream, "lookup")), "idle")
            counts = {"consumers": 3, "dismissed": 1, "holding": 1}
            assert await JOBS["dead_consumers"].run(desk) == counts
        assert names() == {b"holds", b"alive"}
        redis.xtrim(stream, maxlen=0)
        redis.xgroup_destroy(stream, "lookup")


# by hand


def test_a_job_is_run_by_hand_and_listed_with_its_result(server: Server) -> None:
    done = run_json("schedule", "run", "memory", url=server.url)
    assert done["ok"]
    assert done["result"]["used"] > 0
    before = datetime.now(UTC)
    listed = {one["name"]: one for one in run_json("schedule", "list", url=server.url)["jobs"]}
    assert set(listed) == set(JOBS)
    assert listed["memory"]["last"] == done
    assert all(datetime.fromisoformat(one["next"]) > before for one in listed.values())
    refused = run_json("schedule", "run", "nonsense", url=server.url, status=2)
    assert refused["error"]["field"] == "name"


async def test_the_doctor_tells_of_pressure_and_of_jobs_that_fail(
    settings: Callable[..., Settings], server: Server
) -> None:
    async def bad(_: Desk) -> Result:
        raise Unavailable("nobody is there")

    async with at_desk(settings(memory_limit=1000)) as desk:
        await settle(desk.link, 1)  # as every worker does
        await perform(desk, JOBS["memory"], "hand")
        await perform(desk, replace(JOBS["retention"], run=bad), "hand")
    done = await asyncio.to_thread(run, "doctor", "--json", url=server.url, memory_limit=1000)
    told = {one["subject"]: one for one in orjson.loads(done.stdout)["findings"]}
    assert told["schedule"]["level"] == "warn"
    assert "retention failed: nobody is there" in told["schedule"]["detail"]
    assert told["memory"]["level"] == "warn"
    assert "above it" in told["memory"]["detail"]
