"""One application computes for all who ask, in whichever process; none who waits depends on its health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from millpond import (
    Client,
    ComputeError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from shared.keys import PartitionKeys, partition_of
from shared.scripts import SCRIPTS
from tests import faults_support
from tests.application import ARGS, PROFILE, Application, computed
from tests.faults_support import Pond, until
from tests.proxy import Proxy

pond = faults_support.pond

LEASE = 1.0


@pytest.fixture(autouse=True)
def quick(pond: Pond) -> None:
    """A short lease, and a profile whose waiters compute when their leader raises."""
    pond.options |= {"compute_lease": LEASE, "profiles": {"stubborn": {"on_error": "elect"}}}
    pond.settings = pond.with_()


class Mill:
    """An application's function: counts its runs, and goes on only when it is told to."""

    def __init__(self, value: Any = "flour") -> None:
        self.value = value
        self.runs = 0
        self.running = 0
        self.most = 0
        self.go = asyncio.Event()

    async def __call__(self) -> Any:
        """Grind."""
        self.runs += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


def asking(client: Client, mill: Callable[[], Any], profile: str = PROFILE, **how: Any) -> asyncio.Task[Any]:
    how.setdefault("timeout", 20)
    return asyncio.create_task(client.get_or_compute(profile, ARGS, mill, **how))


def aboard(pond: Pond) -> int:
    """Return how many others wait for a flight."""
    return sum(int(pond.redis.execute_command("LLEN", name)) for name in pond.found("{mp:*}:waiters:*"))


def environment(pond: Pond) -> dict[str, Any]:
    return {name: value for name, value in pond.options.items() if value is not None} | {"redis_url": pond.url}


async def test_many_clients_compute_once(pond: Pond, partitions: int) -> None:
    mill = Mill({"n": 1})
    async with pond.working("lookup"), pond.client() as one, pond.client() as two, pond.client() as three:
        asked = [asking(client, mill) for client in (one, two, three) for _ in range(10)]
        await until(lambda: aboard(pond) == 29, "everybody else waits")
        mill.go.set()
        assert await asyncio.gather(*asked) == [{"n": 1}] * 30
        assert await two.get_or_compute(PROFILE, ARGS, mill) == {"n": 1}
        assert (await one.get(PROFILE, ARGS)).tier in ("l1", "l2")
        await pond.settled()
    assert mill.runs == 1


async def test_one_client_leads_any_number_of_flights_in_every_partition(pond: Pond, partitions: int) -> None:
    pond.options["compute_lease"] = 30.0  # nobody is elected a second time
    async with pond.working("lookup"), pond.client() as client:
        asked = [client.get_or_compute(PROFILE, {"n": n}, partial(int, n)) for n in range(40)]
        async with asyncio.timeout(15):
            assert await asyncio.gather(*asked) == list(range(40))


async def test_a_plain_function_runs_beside_the_loop(pond: Pond) -> None:
    threads = []

    def grind() -> str:
        threads.append(threading.current_thread())
        return "flour"

    async with pond.working("lookup"), pond.client() as client:
        assert await client.get_or_compute(PROFILE, ARGS, grind) == "flour"
        assert await client.get_or_compute(PROFILE, ARGS, grind) == "flour"
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_plain_functions_that_wait_for_each_other_find_a_thread_each(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        loop = asyncio.get_running_loop()

        def grind(depth: int) -> int:
            if not depth:
                return 0
            asked = client.get_or_compute(PROFILE, {"depth": depth}, lambda: grind(depth - 1))
            return 1 + int(asyncio.run_coroutine_threadsafe(asked, loop).result(20))

        assert await asyncio.to_thread(grind, 40) == 40


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration()], ids=repr)
async def test_a_plain_function_that_would_end_the_program_is_an_error_of_its_own(
    pond: Pond, error: BaseException
) -> None:
    def grind() -> None:
        raise error

    async with pond.working("lookup"), pond.client() as client:
        with pytest.raises(RuntimeError, match=type(error).__name__):
            await client.get_or_compute(PROFILE, ARGS, grind)
        assert await client.get_or_compute(PROFILE, ARGS, lambda: 1) == 1


@pytest.mark.parametrize("timeout", [0, -1, "1", 1e9])
async def test_a_timeout_that_is_none_is_refused_by_name(pond: Pond, timeout: Any) -> None:
    async with pond.client() as client:
        with pytest.raises(InvalidRequest) as refused:
            await client.get_or_compute(PROFILE, ARGS, lambda: 1, timeout=timeout)
        assert refused.value.field == "timeout"


async def test_everyone_gets_the_value_as_it_is_stored(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        found = [await client.get_or_compute(PROFILE, ARGS, lambda: (1, (2,))) for _ in range(2)]
    assert found == [[1, [2]]] * 2


async def test_a_lease_is_renewed_while_the_function_runs(pond: Pond) -> None:
    mill = Mill()
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        asked = [asking(one, mill), asking(two, mill)]
        await until(lambda: aboard(pond) >= 1, "one waits")
        await asyncio.sleep(2.5 * LEASE)  # longer than the lease: what is tested is that it passes without effect
        mill.go.set()
        assert await asyncio.gather(*asked) == ["flour"] * 2
        await pond.settled()
    assert mill.runs == 1


# errors


async def test_a_leaders_error_reaches_everyone_typed_and_nothing_is_stored(pond: Pond, partitions: int) -> None:
    mill = Mill(LookupError("the sluice is shut"))
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        asked = [asking(client, mill) for client in (one, one, two, two)]
        await until(lambda: aboard(pond) == 3, "the others wait")
        mill.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert sorted(type(one).__name__ for one in found) == ["ComputeError"] * 3 + ["LookupError"]
        told = next(error for error in found if isinstance(error, ComputeError))
        assert told.kind == "LookupError"
        assert "the sluice is shut" in told.message
        assert not await one.get(PROFILE, ARGS)
        await pond.settled()
    assert mill.runs == 1


async def test_where_the_profile_says_so_the_next_computes_after_an_error(pond: Pond, partitions: int) -> None:
    broken, whole = Mill(LookupError("the sluice is shut")), Mill()
    whole.go.set()
    pond.options["compute_lease"] = 30.0
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        leader = asking(one, broken, "stubborn")
        await until(lambda: broken.runs == 1, "one computes")
        followers = [asking(client, whole, "stubborn") for client in (one, two, two)]
        await until(lambda: aboard(pond) == 3, "the others wait")
        broken.go.set()
        with pytest.raises(LookupError):
            await leader
        async with asyncio.timeout(15):  # told, not left to find out
            assert await asyncio.gather(*followers) == ["flour"] * 3
        await pond.settled()
    assert whole.runs == 1


async def test_a_value_that_cannot_be_stored_is_an_error_for_all(pond: Pond) -> None:
    mill = Mill(object())
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        asked = [asking(one, mill), asking(two, mill)]
        await until(lambda: aboard(pond) == 1, "one waits")
        mill.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        await pond.settled()
    assert {type(error) for error in found} == {InvalidRequest, ComputeError}


async def test_a_value_kept_for_errors_stands_in_unless_it_was_invalidated(pond: Pond, partitions: int) -> None:
    pond.options["profiles"] = {"mill": {"ttl": 0.05, "stale_if_error": 100}}
    mill = Mill("old")
    mill.go.set()
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        assert await asking(one, mill, "mill", tags=["a"]) == "old"
        await asyncio.sleep(0.1)  # past its time
        assert not await one.get("mill", ARGS)
        mill.go.clear()
        mill.value = LookupError("the sluice is shut")
        asked = [asking(client, mill, "mill") for client in (one, one, two)]
        await until(lambda: aboard(pond) == 2, "the others wait")
        mill.go.set()
        assert await asyncio.gather(*asked) == ["old"] * 3
        assert mill.runs == 2
        await one.invalidate(tags=["a"])
        with pytest.raises(LookupError):
            await asking(one, mill, "mill")
        await pond.settled()


LEAVING: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "is cancelled": ({}, asyncio.CancelledError),
    "runs out of time": ({"timeout": 0.4}, DeadlineExceeded),
    "closes its client": ({}, asyncio.CancelledError),
}


@pytest.mark.parametrize("how", LEAVING)
async def test_a_waiter_is_elected_at_once_when_its_leader(pond: Pond, partitions: int, how: str) -> None:
    directives, expected = LEAVING[how]
    slow, quick = Mill(), Mill()
    quick.go.set()
    pond.options["compute_lease"] = 30.0  # nobody waits for it
    async with pond.working("lookup"), pond.client() as follower:
        async with pond.client() as client:
            leader = asking(client, slow, **directives)
            await until(lambda: slow.runs == 1, "it computes")
            waiting = [asking(follower, quick) for _ in range(2)]
            await until(lambda: aboard(pond) == 2, "the others wait")
            if how == "is cancelled":
                leader.cancel()
            if how == "runs out of time":
                await asyncio.wait({leader})
        async with asyncio.timeout(5):
            assert [await one for one in waiting] == ["flour"] * 2
        leader.cancel()
        left = (await asyncio.gather(leader, return_exceptions=True))[0]
        assert isinstance(left, expected)
        await pond.settled()
    assert (slow.running, quick.runs) == (0, 1)


async def test_a_follower_that_leaves_disturbs_nobody(pond: Pond) -> None:
    mill = Mill()
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        leader = asking(one, mill)
        await until(lambda: mill.runs == 1, "it computes")
        leaving, staying, late = asking(two, mill), asking(two, mill), asking(two, mill, timeout=0.3)
        await until(lambda: aboard(pond) == 3, "the others wait")
        leaving.cancel()
        with pytest.raises(DeadlineExceeded):
            await late
        mill.go.set()
        assert [await leader, await staying] == ["flour"] * 2
        await pond.settled()
    assert mill.runs == 1


async def test_one_elected_after_it_left_hands_on_at_once(pond: Pond) -> None:
    pond.options["compute_lease"] = 30.0
    mill = Mill()
    mill.go.set()
    async with pond.client() as one, pond.client() as two:
        gone = asking(one, mill)
        await until(lambda: pond.length("requests") == 1, "it is published")
        gone.cancel()
        staying = asking(two, mill)
        await until(lambda: pond.length("requests") == 2, "the other is published behind it")
        async with pond.working("lookup"), asyncio.timeout(5):
            assert await staying == "flour"
            await pond.settled()
    assert mill.runs == 1


# invalidation


async def test_a_value_overtaken_by_an_invalidation_answers_who_asked_before_and_is_not_stored(
    pond: Pond, partitions: int
) -> None:
    old, new = Mill("old"), Mill("new")
    new.go.set()
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        before = [asking(one, old, tags=["mill:1"]), asking(two, old)]
        await until(lambda: aboard(pond) == 1, "one waits")
        await two.invalidate(tags=["mill:1"])
        async with asyncio.timeout(5):
            assert await asking(two, new, tags=["mill:1"]) == "new"
        old.go.set()
        assert await asyncio.gather(*before) == ["old"] * 2
        assert (await one.get(PROFILE, ARGS)).value == "new"
        await pond.settled()
    assert (old.runs, new.runs) == (1, 1)


async def test_tags_of_all_who_joined_invalidate_the_value(pond: Pond) -> None:
    mill = Mill()
    async with pond.working("lookup"), pond.client() as client:
        asked = [asking(client, mill, tags=["a"]), asking(client, mill, tags=["b"])]
        await until(lambda: aboard(pond) == 1, "one waits")
        mill.go.set()
        await asyncio.gather(*asked)
        await client.invalidate(tags=["b"])
        assert not await client.get(PROFILE, ARGS)


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


async def test_a_killed_leader_is_replaced_after_its_lease(pond: Pond, partitions: int, journal: Path) -> None:
    mill = Mill()
    mill.go.set()
    async with pond.working("lookup"), pond.client() as client:
        with Application(environment(pond), {"seconds": 60, "journal": str(journal)}) as leader:
            await asyncio.to_thread(leader.wait_for, "computing")
            waiting = [asking(client, mill) for _ in range(3)]
            await until(lambda: aboard(pond) == 3, "the others wait")
            assert mill.runs == 0
            leader.sigkill()
            async with asyncio.timeout(15 * LEASE):
                assert await asyncio.gather(*waiting) == ["flour"] * 3
    assert (mill.runs, computed(journal)) == (1, 1)


@pytest.mark.parametrize("point", ["lead_after_compute", "lead_after_land"])
async def test_a_leader_killed_when_it_had_the_value_costs_at_most_one_more_run(
    pond: Pond, journal: Path, point: str
) -> None:
    mill = Mill()
    mill.go.set()
    async with pond.working("lookup"), pond.client() as client:
        options = {"seconds": 1.0, "journal": str(journal)}
        with Application(environment(pond) | {"fault": f"kill@{point}"}, options) as leader:
            await asyncio.to_thread(leader.wait_for, "computing")
            waiting = [asking(client, mill) for _ in range(3)]
            await until(lambda: aboard(pond) == 3, "the others wait")
            async with asyncio.timeout(15 * LEASE):
                values = await asyncio.gather(*waiting)
            assert leader.wait() == -9
    landed = point == "lead_after_land"
    assert values == [{"pid": leader.pid} if landed else "flour"] * 3
    assert mill.runs == (0 if landed else 1)


async def test_a_leader_frozen_past_its_lease_writes_nothing_when_it_thaws(
    pond: Pond, partitions: int, journal: Path
) -> None:
    mill = Mill()
    mill.go.set()
    async with pond.working("lookup"), pond.client() as client:
        with Application(environment(pond), {"seconds": 0.5, "journal": str(journal)}) as leader:
            await asyncio.to_thread(leader.wait_for, "computing")
            leader.sigstop()
            async with asyncio.timeout(15 * LEASE):
                assert await asking(client, mill) == "flour"
            await until(lambda: not pond.found("{mp:*}:flight:*"), "the new flight has landed")
            before = pond.keyspace()
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


async def test_applications_in_several_processes_compute_once(pond: Pond, partitions: int, journal: Path) -> None:
    options = {"seconds": 1.0, "journal": str(journal)}
    async with pond.working("lookup"):
        with (
            Application(environment(pond), options) as one,
            Application(environment(pond), options) as two,
            Application(environment(pond), options) as three,
        ):
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


async def test_a_strangers_election_on_its_channel_does_not_stop_a_client(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        (channel,) = pond.found("mp:reply:*")
        pond.redis.xadd(channel, {"a": '{"lead"', "b": '{"lead":{}}', "c": '{"lead":7}', "d": '{"again"'})
        assert await client.get_or_compute(PROFILE, ARGS, lambda: 1) == 1


async def test_without_a_server_it_says_so(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy:
        proxy.refuse = True
        with pytest.raises(Unavailable):
            await pond.client(proxy.url).get_or_compute(PROFILE, ARGS, Mill())


async def test_where_the_cache_is_switched_off_everyone_computes_and_nothing_is_found(pond: Pond) -> None:
    mill = Mill()
    mill.go.set()
    off = pond.with_(cache_enabled=False)
    async with pond.working("lookup", "llm", cache_enabled=False):
        for client in (pond.client(), Client(settings=off)):
            async with client, asyncio.timeout(8):
                assert await asking(client, mill) == "flour"
                assert await asking(client, mill) == "flour"
                assert not await client.get(PROFILE, ARGS)
                await pond.settled()
    assert (mill.runs, pond.calls()) == (4, 0)


async def test_without_a_function_the_profiles_resolver_computes_in_the_pool(
    pond: Pond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grinding.py").write_text("def grind(body): return {'flour of': body['input']['grain']}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pond.options["profiles"] = {"mill": {"resolver": "grinding:grind"}}
    async with pond.working("lookup", "llm"), pond.client() as client:
        found = await asyncio.gather(*(client.get_or_compute("mill", {"grain": "rye"}) for _ in range(3)))
        assert found == [{"flour of": "rye"}] * 3
        assert (await client.get("mill", {"grain": "rye"})).value == found[0]
        await pond.settled()


async def test_who_has_no_function_outlives_an_application_that_computes_for_it(
    pond: Pond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: Path
) -> None:
    (tmp_path / "grinding2.py").write_text("def grind(body): return 'flour'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pond.options["profiles"] = {"mill": {"resolver": "grinding2:grind"}}
    async with pond.working("lookup", "llm"), pond.client() as client:
        options = {"seconds": 60, "journal": str(journal), "profile": "mill"}
        with Application(environment(pond), options) as leader:
            await asyncio.to_thread(leader.wait_for, "computing")
            waiting = asyncio.create_task(client.get_or_compute("mill", ARGS, timeout=20))
            await until(lambda: aboard(pond) == 1, "it waits for the application")
            leader.sigkill()
            async with asyncio.timeout(15 * LEASE):
                assert await waiting == "flour"


async def test_a_value_kept_for_errors_does_not_stand_in_for_those_with_a_max_age(pond: Pond) -> None:
    pond.options["profiles"] = {"mill": {"ttl": 0.05, "stale_if_error": 100}}
    mill = Mill("old")
    mill.go.set()
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        assert await asking(one, mill, "mill") == "old"
        await asyncio.sleep(0.1)  # past its time
        mill.go.clear()
        mill.value = LookupError("the sluice is shut")
        leader = asking(one, mill, "mill")
        await until(lambda: mill.runs == 2, "it computes")
        others = [asking(two, mill, "mill"), asking(two, mill, "mill", max_age=0.01)]
        await until(lambda: aboard(pond) == 2, "the others wait")
        mill.go.set()
        assert [await leader, await others[0]] == ["old"] * 2
        with pytest.raises(ComputeError):
            await others[1]
        with pytest.raises(LookupError):
            await asking(one, mill, "mill", max_age=0.01)


async def test_a_knock_that_finds_no_room_is_no_refusal(pond: Pond) -> None:
    pond.options |= {"compute_lease": 0.5, "request_limit": 1}
    mill = Mill()
    async with pond.client() as one, pond.client() as two:
        async with pond.working("lookup"):
            asked = [asking(one, mill)]
            await until(lambda: mill.runs == 1, "one computes")
            asked.append(asking(two, mill))
            await until(lambda: aboard(pond) == 1, "the other waits")
        await until(lambda: pond.length("requests") == 1, "a knock fills the stream that nobody reads")
        asked.append(asking(two, mill))
        with pytest.raises(Overloaded):
            await asked.pop()
        await asyncio.sleep(0.7)  # the next knock
        mill.go.set()
        assert await asyncio.gather(*asked) == ["flour"] * 2
        async with pond.working("lookup"):
            await pond.settled()
