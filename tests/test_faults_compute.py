"""Applications that compute for all who ask are cut off, killed, frozen: one run, and an answer for everyone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.keys import PartitionKeys, partition_of
from shared.scripts import SCRIPTS
from tests import faults_support, mills
from tests.application import ARGS, PROFILE, Application, computed
from tests.faults_support import Pond, until
from tests.mills import LEASE, Mill, aboard, asking
from tests.proxy import Proxy

pond = faults_support.pond
quick = mills.quick


def environment(pond: Pond) -> dict[str, Any]:
    return {name: value for name, value in pond.options.items() if value is not None} | {"redis_url": pond.url}


# connections


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("script", ["publish", "lead_land", "reply", "lead_renew"])
async def test_a_leader_cut_off_around_any_step_leaves_one_run_and_an_answer_each(
    pond: Pond, script: str, side: str
) -> None:
    sha = SCRIPTS[script].sha.encode()
    mill = Mill()
    async with Proxy.to(pond.url) as proxy, pond.working("lookup"), pond.client() as other:
        async with pond.client(proxy.url) as client:
            (proxy.cut_after if side == "after" else proxy.cut_before)(lambda data: sha in data)
            leader = asking(client, mill)
            await until(lambda: mill.runs == 1, "it computes")
            follower = asking(other, mill)
            await until(lambda: aboard(pond) == 1, "the other waits")
            if script == "lead_renew":
                await until(lambda: proxy.cuts == 1, "a renewal is cut off")
            mill.go.set()
            async with asyncio.timeout(10):
                assert [await leader, await follower] == ["flour"] * 2
            assert proxy.cuts == 1
        await until(lambda: aboard(pond) == 0 or script == "reply", "nobody waits")
    assert mill.runs == 1


# processes


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def options(journal: Path, tmp_path: Path) -> dict[str, Any]:
    """What an application is told: it computes until `go_on`."""
    return {"journal": str(journal), "goes_on": str(tmp_path / "go")}


def go_on(options: dict[str, Any]) -> None:
    Path(options["goes_on"]).touch()


@asynccontextmanager
async def leading(pond: Pond, options: dict[str, Any], **settings: Any) -> AsyncIterator[Application]:
    """Run an application in a process of its own, and wait until it computes."""
    with Application(environment(pond) | settings, options) as leader:
        await asyncio.to_thread(leader.wait_for, "computing")
        yield leader


async def test_a_killed_leader_is_replaced_after_its_lease(
    pond: Pond, partitions: int, journal: Path, options: dict[str, Any]
) -> None:
    mill = Mill()
    mill.go.set()
    async with pond.working("lookup"), pond.client() as client, leading(pond, options) as leader:
        waiting = [asking(client, mill) for _ in range(3)]
        await until(lambda: aboard(pond) == 3, "the others wait")
        assert mill.runs == 0
        leader.sigkill()
        async with asyncio.timeout(15 * LEASE):
            assert await asyncio.gather(*waiting) == ["flour"] * 3
    assert (mill.runs, computed(journal)) == (1, 1)


@pytest.mark.parametrize("point", ["lead_after_compute", "lead_after_land"])
async def test_a_leader_killed_when_it_had_the_value_costs_at_most_one_more_run(
    pond: Pond, journal: Path, options: dict[str, Any], point: str
) -> None:
    mill = Mill()
    mill.go.set()
    async with pond.working("lookup"), pond.client() as client, leading(pond, options, fault=f"kill@{point}") as leader:
        waiting = [asking(client, mill) for _ in range(3)]
        await until(lambda: aboard(pond) == 3, "the others wait")
        go_on(options)
        async with asyncio.timeout(15 * LEASE):
            values = await asyncio.gather(*waiting)
        assert leader.wait() == -9
    landed = point == "lead_after_land"
    assert values == [{"pid": leader.pid} if landed else "flour"] * 3
    assert mill.runs == (0 if landed else 1)


async def test_a_leader_frozen_past_its_lease_writes_nothing_when_it_thaws(
    pond: Pond, partitions: int, journal: Path, options: dict[str, Any]
) -> None:
    mill = Mill()
    mill.go.set()
    async with pond.working("lookup"), pond.client() as client:
        async with leading(pond, options) as leader:
            leader.sigstop()
            async with asyncio.timeout(15 * LEASE):
                assert await asking(client, mill) == "flour"
            await until(lambda: not pond.found("{mp:*}:flight:*"), "the new flight has landed")
            before = pond.keyspace()
            go_on(options)
            leader.sigcont()
            said = await asyncio.to_thread(leader.wait_for, "value")
            assert said["value"] == {"pid": leader.pid}, "its own caller gets what it computed"
            assert leader.wait() == 0
            assert stored(pond.keyspace()) == stored(before)
        assert (await client.get(PROFILE, ARGS)).value == "flour"
    assert (mill.runs, computed(journal)) == (1, 1)


def stored(keyspace: dict[bytes, Any]) -> dict[bytes, Any]:
    """Return what a leader could have written: all but reply channels."""
    return {key: value for key, value in keyspace.items() if not key.startswith(b"mp:reply:")}


async def test_applications_in_several_processes_compute_once(
    pond: Pond, partitions: int, journal: Path, options: dict[str, Any]
) -> None:
    async with pond.working("lookup"):
        with (
            Application(environment(pond), options) as one,
            Application(environment(pond), options) as two,
            Application(environment(pond), options) as three,
        ):
            await until(lambda: computed(journal) and aboard(pond) == 2, "one computes, the others wait")
            go_on(options)
            said = [await asyncio.to_thread(process.wait_for, "value") for process in (one, two, three)]
        await pond.settled()
    assert len({str(line["value"]) for line in said}) == 1
    assert computed(journal) == 1


# fencing, step by step


async def test_every_script_of_a_lost_lease_says_so_and_writes_nothing(pond: Pond) -> None:
    mill = Mill()
    async with pond.working("lookup"), pond.client() as client:
        asked = asking(client, mill)
        await until(lambda: mill.runs == 1, "it computes")
        key = (await client.get(PROFILE, ARGS)).epoch and pond.found("{mp:*}:flight:*")[0].decode().rpartition(":")[2]
        assert key
        names = PartitionKeys(partition_of(key, pond.partitions))
        pond.redis.hset(names.flight(key), "token", "another")
        before = pond.keyspace()
        ours = [names.flight(key), names.waiters(key, "mine"), names.outcome(key, "mine")]
        failing = [*ours, names.entry(key), names.tags]
        landing = [names.entry(key), *ours, names.tags, names.landed, names.invalidations]
        args: list[Any] = [key, "mine", "0-0", 1000, 0, 0, 1000, "{}", "1", 1000, 1000, 1000, "", 0]
        execute = pond.redis.execute_command
        assert execute(*SCRIPTS["lead_renew"].call(ours[:1], ["mine", 99_000, 1])) == 0
        assert execute(*SCRIPTS["lead_fail"].call(failing, ["mine", 1000, 1, key, 1])) == [b"LOST"]
        assert execute(*SCRIPTS["lead_land"].call(landing, args)) == [b"LOST"]
        assert stored(pond.keyspace()) == stored(before)
        pond.redis.delete(names.flight(key))
        mill.go.set()
        assert await asked == "flour"
        assert not await client.get(PROFILE, ARGS), "it had lost its flight"


async def test_who_has_no_function_outlives_an_application_that_computes_for_it(
    pond: Pond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (tmp_path / "grinding2.py").write_text("def grind(body): return 'flour'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pond.options["profiles"] = {"mill": {"resolver": "grinding2:grind"}}
    async with (
        pond.working("lookup", "llm"),
        pond.client() as client,
        leading(pond, options | {"profile": "mill"}) as leader,
    ):
        waiting = asyncio.create_task(client.get_or_compute("mill", ARGS, timeout=20))
        await until(lambda: aboard(pond) == 1, "it waits for the application")
        leader.sigkill()
        async with asyncio.timeout(15 * LEASE):
            assert await waiting == "flour"
