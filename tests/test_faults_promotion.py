"""Promotion workers that are killed, frozen, flushed under: a report counts as if it had been handled once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from shared.keys import PROMOTION_GROUP
from tests import faults_support
from tests.faults_support import Pond, until
from tests.shelf import HOUR_MS, PROBATION_MS, Shelf
from tests.test_worker_edges import left_by_the_dead

pond = faults_support.pond

POINTS = ("promotion_after_read", "promotion_before_ack")


@pytest.fixture
def shelf(pond: Pond) -> Iterator[Shelf]:
    pond.options |= {"background_lease": 1.0}
    yield Shelf(pond)
    pond.redis.delete(*(names.tags for names in pond.all_names()))


@pytest.mark.parametrize("point", POINTS)
async def test_a_promotion_worker_killed_at_any_point_leaves_its_report_to_another(
    pond: Pond, partitions: int, shelf: Shelf, point: str
) -> None:
    shelf.put(1, left_ms=30_000, age_ms=HOUR_MS)
    async with pond.process("promotion", fault=f"kill@{point}", ready=False) as victim:
        shelf.report({1: [0, 3, 0]})
        assert await asyncio.to_thread(victim.wait) == -9
    promoted = shelf.leaves_at(1) if point == "promotion_before_ack" else None
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.left_ms(1) > PROBATION_MS + HOUR_MS
    assert promoted in (None, shelf.leaves_at(1)), "told twice, it says the same moment"


@pytest.mark.parametrize("point", POINTS)
async def test_a_promotion_worker_frozen_past_its_lease_changes_nothing_when_it_wakes(
    pond: Pond, partitions: int, shelf: Shelf, point: str
) -> None:
    shelf.put(1, left_ms=30_000, age_ms=HOUR_MS)
    async with pond.process("promotion", fault=f"stop@{point}", ready=False) as zombie:
        shelf.report({1: [0, 3, 0]})
        await asyncio.to_thread(zombie.await_stopped)
        async with pond.working("promotion"):
            await shelf.handled()
            before, leaves = pond.keyspace(), shelf.leaves_at(1)
            zombie.sigcont()
            await asyncio.to_thread(zombie.terminate)
            assert pond.keyspace() == before
            assert shelf.leaves_at(1) == leaves
    assert shelf.left_ms(1) > PROBATION_MS + HOUR_MS


async def test_a_frozen_promotion_worker_does_not_keep_what_was_invalidated_meanwhile(
    pond: Pond, partitions: int, shelf: Shelf
) -> None:
    shelf.put(1, "doc:1", left_ms=30_000)
    async with pond.process("promotion", fault="stop@promotion_after_read", ready=False) as zombie:
        shelf.report({1: [0, 3, 0]})
        await asyncio.to_thread(zombie.await_stopped)
        shelf.invalidate(1, "doc:1")
        zombie.sigcont()
        await shelf.handled()
    assert shelf.get(1) is None


async def test_a_report_that_ends_its_workers_is_given_up_and_stays_in_the_stream(pond: Pond, shelf: Shelf) -> None:
    shelf.put(1, left_ms=30_000)
    shelf.report({1: [1, 0, 0]})
    left_by_the_dead(pond, shelf.names(1).touches, PROMOTION_GROUP, deliveries=pond.settings.max_deliveries)
    async with pond.working("promotion"):
        await shelf.handled()
    assert pond.stat("touches_lost") == 1
    assert pond.length("touches") == 1
    assert pond.length("dead") == 0


async def test_a_promotion_worker_asked_to_stop_hands_back_at_once(pond: Pond, partitions: int, shelf: Shelf) -> None:
    pond.options |= {"background_lease": 60.0}
    async with pond.process("promotion") as leaving:
        name = leaving.name
        assert await asyncio.to_thread(leaving.terminate) == 0
    assert name not in pond.consumers("touches")
    shelf.put(1, left_ms=30_000)
    shelf.report({1: [1, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.left_ms(1) > 30_000


async def test_after_a_flush_promotion_begins_anew(pond: Pond, partitions: int, shelf: Shelf) -> None:
    async with pond.working("promotion"):
        shelf.put(1, left_ms=30_000)
        shelf.report({1: [1, 0, 0]})
        await shelf.handled()
        pond.redis.flushall()
        Shelf(pond)
        await until(lambda: pond.redis.exists(shelf.names(1).touches), "the group is made anew")
        shelf.put(1, left_ms=30_000)
        shelf.report({1: [1, 0, 0]})
        await until(lambda: shelf.left_ms(1) > 30_000, "reports count again")
        await shelf.handled()


async def test_a_connection_cut_in_any_moment_loses_no_report(pond: Pond, shelf: Shelf) -> None:
    async with pond.working("promotion"):
        shelf.put(1, left_ms=30_000)
        for client in pond.redis.client_list():
            if client["name"].startswith("millpond-promotion"):
                pond.redis.client_kill_filter(_id=client["id"])
        shelf.report({1: [1, 0, 0]})
        await shelf.handled()
    assert shelf.left_ms(1) > 30_000
