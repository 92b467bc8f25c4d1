"""Lookup workers that are killed, frozen and stopped: every client still gets its one answer."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import pytest

from shared.keys import PartitionKeys
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, until
from tests.processes import Process

pond = faults_support.pond

#: What a miss passes, and what a hit passes.
MISSING = ("lookup_after_read", "lookup_before_reply", "lookup_after_join")
HITTING = ("lookup_after_read", "lookup_before_reply", "lookup_after_reply")
PROMPTS = ["What is a weir?", "What is a sluice?", "What is a leat?"]


@pytest.mark.parametrize("point", MISSING)
async def test_a_lookup_worker_killed_at_any_point_costs_nobody_an_answer(
    pond: Pond, partitions: int, point: str
) -> None:
    async with pond.process("lookup", fault=f"kill@{point}") as victim, pond.client() as client:
        asked = [asyncio.create_task(client.ask(prompt)) for prompt in PROMPTS * 2]
        assert await asyncio.to_thread(victim.wait) == -9
        async with pond.working("lookup", "llm"):
            await answers(asked)
            await pond.settled()
    assert [pond.calls(prompt) for prompt in PROMPTS] == [1, 1, 1]


@pytest.mark.parametrize("point", HITTING)
async def test_a_lookup_worker_killed_while_it_serves_a_hit_costs_nobody_an_answer(pond: Pond, point: str) -> None:
    async with pond.working("llm"), pond.client() as client:
        async with pond.working("lookup"):
            await client.ask("What is a weir?")
        async with pond.process("lookup", fault=f"kill@{point}") as victim:
            asked = [asyncio.create_task(client.ask("What is a weir?")) for _ in range(5)]
            assert await asyncio.to_thread(victim.wait) == -9
            async with pond.working("lookup"):
                found = await answers(asked)
                await pond.settled()
    assert pond.calls() == 1
    assert {reply.tier for reply in found} <= {"l1", "l2"}


@pytest.mark.parametrize("point", MISSING)
async def test_a_lookup_worker_frozen_past_its_lease_writes_nothing_when_it_wakes(
    pond: Pond, partitions: int, point: str
) -> None:
    await _frozen_past_its_lease(pond, point, pond.names(PROMPTS[0]))
    assert pond.calls() == 1


async def test_a_lookup_worker_frozen_past_its_lease_does_not_begin_another_flight(pond: Pond) -> None:
    """A refresh is never answered from the cache: only ownership keeps the thawed worker from joining once more."""
    await _frozen_past_its_lease(pond, "lookup_before_reply", pond.names(PROMPTS[0]), cache=b'{"mode":"refresh"}')
    assert pond.calls() == 1


@pytest.mark.parametrize(("point", "replies"), [*zip(HITTING, (1, 1, 2), strict=True)])
async def test_a_frozen_lookup_worker_does_not_serve_its_hit_after_its_lease(
    pond: Pond, point: str, replies: int
) -> None:
    """One that had replied when it froze is repeated by who takes over: clients drop the second by its id."""
    raw, prompt = Raw(pond), PROMPTS[0]
    async with pond.working("lookup", "llm"):
        raw.publish("r0", prompt)
        await raw.answered("r0")
        await pond.settled()
    async with pond.process("lookup", fault=f"stop@{point}") as zombie:
        raw.publish("r1", prompt)
        await asyncio.to_thread(zombie.await_stopped)
        async with pond.working("lookup"):
            await raw.answered("r1")
            await pond.settled()
        assert len(raw.replies("r1")) == replies
        await _wakes_and_writes_nothing(pond, zombie, pond.names(prompt), prompt)
    assert pond.calls() == 1


async def test_a_frozen_lookup_worker_does_not_hand_a_misrouted_request_over_twice(pond: Pond) -> None:
    pond = Pond(pond.url, pond.redis, pond.options | {"partitions": 4})
    wrong = PartitionKeys((pond.names(PROMPTS[0]).partition + 1) % 4)
    await _frozen_past_its_lease(pond, "lookup_after_read", wrong)


async def _frozen_past_its_lease(pond: Pond, point: str, names: PartitionKeys, **fields: Any) -> None:
    """Freeze a lookup worker at `point` on a miss, let another answer, thaw it: one reply, and it writes nothing."""
    raw, prompt = Raw(pond), PROMPTS[0]
    async with pond.working("llm"), pond.process("lookup", fault=f"stop@{point}") as zombie:
        raw.publish("r1", prompt, partition=names.partition, **fields)
        await asyncio.to_thread(zombie.await_stopped)
        async with pond.working("lookup"):
            await raw.answered("r1")
            await pond.settled()
        await _wakes_and_writes_nothing(pond, zombie, names, prompt)
    assert len(raw.replies("r1")) == 1


async def _wakes_and_writes_nothing(pond: Pond, zombie: Process, names: PartitionKeys, prompt: str) -> None:
    before = pond.keyspace()
    await _wake(pond, zombie, names, prompt)
    assert pond.keyspace() == before


async def _wake(pond: Pond, zombie: Process, names: PartitionKeys, prompt: str) -> None:
    """Thaw the only lookup worker left, and ask it something: its answer comes after it is through with the rest."""
    probe = Raw(pond, "probe")
    probe.publish("p", prompt, partition=names.partition, cache=b'{"mode":"only-if-cached"}')
    zombie.sigcont()
    await probe.answered("p")
    await pond.settled()
    pond.redis.delete(probe.channel)


async def test_a_lookup_worker_asked_to_stop_leaves_at_once_and_nobody_waits_for_its_lease(
    pond: Pond, partitions: int
) -> None:
    pond.options |= {"lookup_lease": 20.0}
    async with pond.working("llm"), pond.client() as client, pond.process("lookup") as leaving:
        asked = [asyncio.create_task(client.ask(f"{prompt} {n}")) for n in range(30) for prompt in PROMPTS]
        await until(lambda: pond.calls() > 0, "requests are in the works")
        asked += [asyncio.create_task(client.ask(f"{prompt} {n}")) for n in range(30, 40) for prompt in PROMPTS]
        name = leaving.name
        began = time.monotonic()
        assert await asyncio.to_thread(leaving.terminate) == 0
        async with pond.working("lookup"):
            await answers(asked)
            assert time.monotonic() - began < 10
            await pond.settled()
            assert name not in pond.consumers("requests")
    assert pond.calls() == 120


async def test_a_frozen_lookup_worker_that_was_asked_to_stop_takes_nothing_with_it(pond: Pond) -> None:
    raw = Raw(pond)
    async with pond.working("llm"), pond.process("lookup", fault="stop@lookup_after_read") as zombie:
        raw.publish("r1", PROMPTS[0])
        await asyncio.to_thread(zombie.await_stopped)
        raw.publish("r2", PROMPTS[1])
        async with pond.working("lookup"):
            await raw.answered("r1")
            await raw.answered("r2")
            name = zombie.name
            zombie.send(signal.SIGTERM)
            zombie.sigcont()
            assert await asyncio.to_thread(zombie.wait) == 0
            await pond.settled()
            assert name not in pond.consumers("requests")
    assert pond.calls() == 2


async def test_a_lookup_worker_whose_group_is_destroyed_makes_it_anew_and_loses_nothing(
    pond: Pond, partitions: int
) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        asked = []
        for n in range(10):
            asked += [asyncio.create_task(client.ask(f"{prompt} {n}")) for prompt in PROMPTS]
            await asyncio.sleep(0)
            for names in pond.all_names():
                pond.redis.execute_command("XGROUP", "DESTROY", names.requests, "lookup")
        await answers(asked)
        await pond.settled()
    assert pond.calls() == 30
