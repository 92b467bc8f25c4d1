"""One application computes for all who ask, in whichever process; none who waits depends on its health."""

from __future__ import annotations

import asyncio
import threading
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
from shared.scripts import SCRIPTS
from tests import faults_support, mills
from tests.application import ARGS, PROFILE
from tests.faults_support import Pond, throughout, until
from tests.mills import LEASE, Mill, aboard, asking
from tests.proxy import Proxy

pond = faults_support.pond
quick = mills.quick


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
        await until(lambda: aboard(pond) == 1, "one waits")
        (flight,) = pond.found("{mp:*}:flight:*")
        token = pond.redis.hget(flight, "token")
        # So long that whoever waits has knocked, and would have been elected, had the lease run out.
        await throughout(2.5 * LEASE, lambda: pond.redis.hget(flight, "token") == token, "it is the same flight")
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
        await pond.aged()
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


# who and when


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


async def test_a_value_kept_for_errors_does_not_stand_in_for_those_with_a_max_age(pond: Pond) -> None:
    pond.options["profiles"] = {"mill": {"ttl": 0.05, "stale_if_error": 100}}
    mill = Mill("old")
    mill.go.set()
    async with pond.working("lookup"), pond.client() as one, pond.client() as two:
        assert await asking(one, mill, "mill") == "old"
        await pond.aged()
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
    mill, publish, published = Mill(), SCRIPTS["publish"].sha.encode(), 0

    def counted(data: bytes) -> bool:
        nonlocal published
        published += data.count(publish)
        return False

    async with Proxy.to(pond.url) as proxy, pond.client() as one, pond.client(proxy.url) as two:
        proxy.cut_before(counted)
        async with pond.working("lookup"):
            asked = [asking(one, mill)]
            await until(lambda: mill.runs == 1, "one computes")
            asked.append(asking(two, mill))
            await until(lambda: aboard(pond) == 1, "the other waits")
        await until(lambda: pond.length("requests") == 1, "a knock fills the stream that nobody reads")
        asked.append(asking(two, mill))
        with pytest.raises(Overloaded):
            await asked.pop()
        before = published
        await until(lambda: published > before + 1 or asked[1].done(), "it knocked, was not let in, and knocks again")
        mill.go.set()
        assert await asyncio.gather(*asked) == ["flour"] * 2
        async with pond.working("lookup"):
            await pond.settled()
