"""LLM workers that are killed, frozen, stopped: one answer, told to everyone, paid for again only per lost lease."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import pytest

from shared.errors import ProviderError
from shared.keys import LLM_GROUP
from shared.providers.simulated import calls as calls_in
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, outcomes, until
from tests.processes import Process
from tests.test_worker_edges import left_by_the_dead
from workers.flight import Fill
from workers.llm import LLMConsumer
from workers.settling import Settling

pond = faults_support.pond

PROMPT = "What is a mill race?"
#: What dying at a point costs: the calls in all, the repeated one included.
KILLED = [("llm_after_read", 1), ("llm_after_compute", 2), ("llm_after_land", 1), ("llm_after_reply", 1)]
#: What freezing there costs, at most: a frozen worker that had not called yet may call when it wakes, before it learns.
FROZEN = [("llm_after_read", 2), ("llm_after_compute", 2), ("llm_after_land", 1), ("llm_after_reply", 1)]


@pytest.mark.parametrize(("point", "calls"), KILLED)
async def test_an_llm_worker_killed_at_any_point_costs_nobody_an_answer(
    pond: Pond, partitions: int, point: str, calls: int
) -> None:
    async with pond.working("lookup"), pond.client() as leader, pond.client() as follower:
        asked = [asyncio.create_task(client.ask(PROMPT)) for client in (leader, follower, follower)]
        await until(lambda: pond.length("fills"), "the flight has begun")
        async with pond.process("llm", fault=f"kill@{point}", ready=False) as victim:
            assert await asyncio.to_thread(victim.wait) == -9
        async with pond.working("llm"):
            await answers(asked)
            await pond.settled()
    assert pond.calls() == calls


async def test_an_llm_worker_killed_in_the_middle_of_many_calls_costs_one_more_call_each(
    pond: Pond, partitions: int
) -> None:
    prompts = [f"{PROMPT} ({n})" for n in range(12)]
    async with pond.working("lookup"), pond.client() as client:
        async with pond.process("llm", simulated_first_token=30.0) as victim:
            asked = [asyncio.create_task(client.ask(prompt)) for prompt in prompts]
            await until(lambda: pond.calls() == 12, "all calls are in progress")
            victim.sigkill()
        async with pond.working("llm"):
            await answers(asked)
            await pond.settled()
    assert [pond.calls(prompt) for prompt in prompts] == [2] * 12


async def test_refreshes_of_a_killed_worker_leave_half_the_slots_to_who_waits(pond: Pond) -> None:
    pond.options |= {"profiles": {"response": {"ttl": 0.05, "stale_while_revalidate": 60}}, "llm_lease": 0.5}
    prompts = [f"{PROMPT} ({n})" for n in range(8)]
    async with pond.client() as client:
        async with pond.working("lookup", "llm"):
            await answers([client.ask(prompt) for prompt in prompts])
        async with pond.working("lookup"):
            while pond.length("refreshes") < 8:
                await answers([client.ask(prompt) for prompt in prompts])
            async with pond.process("llm", concurrency=16, simulated_first_token=30.0) as victim:
                await until(lambda: pond.calls() == 16, "it computes all refreshes")
                victim.sigkill()
            waiting = asyncio.create_task(client.ask(PROMPT))
            await until(lambda: pond.length("fills"), "somebody waits for a new answer")
            await until(lambda: _idle_ms(pond) > 1000, "the leases of the dead worker have run out")
            async with pond.working("llm", concurrency=4):
                await waiting
                await pond.settled()
    after = [call["prompt"] for call in calls_in(pond.journal)][16:]
    assert sorted(after) == sorted([*prompts, PROMPT])
    assert after.index(PROMPT) <= 2, "before it, refreshes may take no more than half of the slots"


async def test_what_a_dead_worker_left_of_refreshes_goes_before_new_ones(pond: Pond) -> None:
    response = {"ttl": 0.05, "stale_while_revalidate": 600, "early_refresh": 0.0}
    pond.options |= {"profiles": {"response": response}, "llm_lease": 0.5}
    others = [f"{PROMPT} ({n})" for n in range(60)]
    async with pond.client() as client, pond.working("lookup"):
        async with pond.working("llm", concurrency=64):
            await answers([client.ask(prompt) for prompt in (PROMPT, *others)])
            await pond.settled()
        await pond.aged()
        assert (await client.ask(PROMPT)).stale
        await until(lambda: pond.length("refreshes") == 1, "its refresh is asked for")
        refreshes = pond.names(PROMPT).refreshes
        left_by_the_dead(pond, refreshes, LLM_GROUP, idle_ms=0)
        waiting = asyncio.create_task(client.ask(PROMPT, max_age=0.001))
        await until(lambda: pond.found("{mp:*}:waiters:*"), "somebody is aboard what the dead worker took")
        while pond.length("refreshes") < 61:
            await answers([client.ask(prompt) for prompt in others])
        async with pond.working("llm", concurrency=4 * pond.partitions, simulated_first_token=0.1):
            assert not (await waiting).stale
            assert pond.length("refreshes") > 30, "it had to wait for none but those that were under way"
            await pond.settled()


def _idle_ms(pond: Pond) -> int:
    """How long the one that was renewed last has not been."""
    (group,) = pond._groups(pond.all_names()[0].refreshes)
    held = pond.redis.xpending_range(pond.all_names()[0].refreshes, group["name"], "-", "+", 100)
    return min((int(one["time_since_delivered"]) for one in held), default=0)


@pytest.mark.parametrize("point", ["llm_after_land", "llm_after_reply"])
async def test_a_failure_recorded_by_a_killed_worker_reaches_its_waiters_without_another_call(
    pond: Pond, point: str
) -> None:
    pond.options |= {"simulated_failure_rate": 1.0, "attempts": 2, "backoff_initial": 0.0}
    async with pond.working("lookup"), pond.client() as client:
        async with pond.process("llm", fault=f"kill@{point}") as victim:
            asked = [asyncio.create_task(client.ask(PROMPT)) for _ in range(3)]
            assert await asyncio.to_thread(victim.wait) == -9
        async with pond.working("llm"):
            found = await outcomes(asked)
            await pond.settled()
    assert [(type(one), getattr(one, "status", None)) for one in found] == [(ProviderError, 503)] * 3
    assert pond.calls() == 2


@pytest.mark.parametrize(("point", "calls"), FROZEN)
async def test_an_llm_worker_frozen_past_its_lease_writes_nothing_when_it_wakes(
    pond: Pond, partitions: int, point: str, calls: int
) -> None:
    raw = Raw(pond)
    async with pond.working("lookup"):
        raw.publish("r1", PROMPT)
        await until(lambda: pond.length("fills"), "the flight has begun")
        async with pond.process("llm", fault=f"stop@{point}", ready=False) as zombie:
            await asyncio.to_thread(zombie.await_stopped)
            async with pond.working("llm"):
                await _finished_by_another(pond, raw, zombie)
    assert pond.calls() in (calls, 1 if point == "llm_after_read" else calls)
    # Replies that had left before it froze are repeated by who takes over; clients drop the second by its id.
    assert len(raw.replies("r1")) <= (2 if point == "llm_after_reply" else 1)


async def test_an_llm_worker_frozen_in_the_middle_of_a_call_writes_nothing_when_it_wakes(
    pond: Pond, partitions: int
) -> None:
    raw = Raw(pond)
    async with pond.working("lookup"), pond.process("llm", simulated_first_token=0.6) as zombie:
        raw.publish("r1", PROMPT)
        await until(lambda: pond.calls() == 1, "the call is in progress")
        await asyncio.to_thread(zombie.sigstop)
        async with pond.working("llm"):
            await _finished_by_another(pond, raw, zombie)
    assert pond.calls() == 2
    assert len(raw.replies("r1")) == 1


async def test_a_frozen_worker_cannot_overwrite_what_was_computed_after_an_invalidation(pond: Pond) -> None:
    raw = Raw(pond)
    async with pond.working("lookup"), pond.client() as client:
        async with pond.process("llm", fault="stop@llm_after_compute") as zombie:
            raw.publish("r1", PROMPT)
            await asyncio.to_thread(zombie.await_stopped)
            await client.invalidate(everything=True)
            async with pond.working("llm"):
                assert (await client.ask(PROMPT)).tier == "llm"
                await _finished_by_another(pond, raw, zombie)
        assert (await client.ask(PROMPT)).tier in ("l1", "l2")
    assert raw.replies("r1")[0]["stored"] == "overtaken"


def _called_more_than(pond: Pond, times: int) -> bool:
    return pond.calls() > times


async def _finished_by_another(pond: Pond, raw: Raw, zombie: Process) -> None:
    """Wait until all is done without a frozen LLM worker; thaw it, and it writes nothing, as its fill is another's."""
    await raw.answered("r1")
    await pond.settled()
    before = pond.keyspace()
    zombie.sigcont()
    await until(
        lambda: "nothing written" in zombie.errors or "lost the lease" in zombie.errors, "it learns of its loss"
    )
    assert pond.keyspace() == before


async def test_an_llm_worker_asked_to_stop_finishes_its_calls_and_leaves_the_group(pond: Pond, partitions: int) -> None:
    pond.options |= {"llm_lease": 20.0}
    async with (
        pond.working("lookup"),
        pond.process("llm", simulated_first_token=0.8) as leaving,
        pond.client() as client,
    ):
        asked = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(8)]
        await until(lambda: pond.calls() == 8, "all calls are in progress")
        name = leaving.name
        assert await asyncio.to_thread(leaving.terminate) == 0
        await answers(asked)
        await pond.settled()
        assert name not in pond.consumers("fills") | pond.consumers("refreshes")
    assert pond.calls() == 8


async def test_an_llm_worker_asked_to_stop_hands_back_what_it_cannot_finish(pond: Pond, partitions: int) -> None:
    pond.options |= {"llm_lease": 20.0, "drain_timeout": 0.1, "max_deliveries": 2}
    async with pond.working("lookup"), pond.client() as client:
        async with pond.process("llm", simulated_first_token=60.0) as leaving:
            asked = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(8)]
            await until(lambda: pond.calls() == 8, "all calls are in progress")
            name, began = leaving.name, time.monotonic()
            assert await asyncio.to_thread(leaving.terminate) == 0
        assert name not in pond.consumers("fills") | pond.consumers("refreshes")
        async with pond.working("llm"):
            await answers(asked)
            assert time.monotonic() - began < 10, "nobody waited for the lease"
            await pond.settled()
    assert pond.calls() == 16


async def test_an_llm_worker_whose_group_is_destroyed_makes_it_anew_and_loses_nothing(
    pond: Pond, partitions: int
) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        asked = []
        for n in range(6):
            asked += [asyncio.create_task(client.ask(f"{PROMPT} ({n}, {m})")) for m in range(5)]
            await until(partial(_called_more_than, pond, 2 * n), "some of them are being computed")
            for names in pond.all_names():
                pond.redis.execute_command("XGROUP", "DESTROY", names.fills, "llm")
        await answers(asked)
        await pond.settled()
    assert pond.calls() >= 30


async def test_a_lease_renewed_while_its_flight_is_cleared_is_not_lost(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear, renew, rounds, cleared = Settling.clear, LLMConsumer._renew, asyncio.Semaphore(0), 0

    async def counted(self: LLMConsumer, held: Any) -> None:
        await renew(self, held)
        rounds.release()

    async def late(self: Settling, fill: Fill) -> None:
        nonlocal cleared
        await clear(self, fill)
        for _ in range(2):  # one may have been on its way
            await rounds.acquire()
        cleared += 1

    monkeypatch.setattr(LLMConsumer, "_renew", counted)
    monkeypatch.setattr(Settling, "clear", late)
    async with pond.working("lookup", "llm", llm_lease=0.5, simulated_first_token=0.01), pond.client() as client:
        await client.ask(PROMPT)
        await until(lambda: cleared, "the flight has ended")
    assert pond.stat("leases_lost") == 0
