"""What was invalidated leaves L2 and L3, that and nothing else; it is counted, and the audit says who and why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.errors import DeadlineExceeded, Unavailable
from shared.keys import PartitionKeys
from shared.link import Link
from shared.scripts import SCRIPTS
from tests import faults_support
from tests.databases import Database
from tests.faults_support import Pond, until
from tests.shelf import Shelf, key
from tests.stock import Stock, eventually, forget
from workers.sweep import LogEntry, Tally

pond = faults_support.pond

#: number -> its tags
ANSWERS: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("doc:1",),
    2: ("doc:2", "user:7"),
    3: ("doc:12",),
    4: ("user:7",),
    5: ("doc:1", "user:8"),
}


@pytest.fixture
async def stock(pond: Pond, database: Database) -> AsyncIterator[Stock]:
    pond.options |= {"database_url": database.url, "background_lease": 1.0}
    yield Stock(pond, database)


async def is_left(stock: Stock, expected: set[int]) -> bool:
    return stock.left_in_l2() == expected == await stock.left_in_l3()


async def fill(stock: Stock) -> None:
    for number, tags in ANSWERS.items():
        await stock.store(number, *tags, epoch=stock.newest(number))


#: what is named, and what goes
CASES: list[tuple[dict[str, Any], set[int]]] = [
    ({"tags": ["doc:1"]}, {1, 5}),
    ({"tags": ["doc:1", "user:7"]}, {1, 2, 4, 5}),
    ({"tags": ["doc:3"]}, set()),
    ({"key": key(3)}, {3}),
    ({"key": key(3), "tags": ["doc:2"]}, {2, 3}),
    ({"prefix": "doc:1"}, {1, 3, 5}),
    ({"prefix": "doc:", "key": key(0)}, {0, 1, 2, 3, 5}),
    ({"profile": "response"}, set(ANSWERS)),
    ({"tenant": "acme"}, set()),
    ({"model": "m"}, set(ANSWERS)),
    ({"everything": True}, set(ANSWERS)),
]


async def test_exactly_what_is_named_leaves_both_tiers(pond: Pond, partitions: int, stock: Stock) -> None:
    async with pond.working("invalidation"), pond.client() as client:
        for what, gone in CASES:
            await stock.clear()
            await fill(stock)
            counted = await client.invalidate(dry_run=True, **what)
            assert (counted.l2, counted.l3, await stock.left()) == (len(gone), len(gone), set(ANSWERS)), what
            assert await forget(client, reason="a test", by="me", **what) == (len(gone), len(gone)), what
            assert await stock.left() == set(ANSWERS) - gone, what
        await stock.worked_off()
    audit = await stock.audit()
    total = sum(len(gone) for _, gone in CASES)
    assert [sum(row["l3"] for row in audit if row["dry_run"] is dry) for dry in (True, False)] == [total] * 2
    orders = [row for row in audit if not row["dry_run"]]
    assert {(row["by"], row["reason"]) for row in orders} == {("me", "a test")}
    assert sorted(row["partition"] for row in orders) == sorted(list(range(partitions)) * len(CASES))


async def test_what_began_later_stays(pond: Pond, stock: Stock) -> None:
    async with pond.client() as client:
        ids = await client.invalidate(tags=["a"])
        await stock.store(1, "a", epoch=ids[0])
        await stock.store(2, "a")
        async with pond.working("invalidation"):
            assert await forget(client, tags=["b"]) == (0, 0)
            await stock.worked_off()
    assert await stock.left() == {1}


async def test_each_answer_is_counted_for_the_first_that_voided_it(pond: Pond, stock: Stock) -> None:
    await fill(stock)
    async with pond.client() as client:
        waiting = [
            asyncio.ensure_future(client.invalidate(wait=20.0, **what))
            for what in ({"tags": ["doc:1"]}, {"prefix": "doc:"}, {"everything": True})
        ]
        await until(lambda: pond.length("invalidations") == 4, "the log holds them")
        async with pond.working("invalidation"):
            found = await asyncio.gather(*waiting)
    assert [(one.l2, one.l3) for one in found] == [(2, 2), (2, 2), (2, 2)]
    assert await stock.left() == set()


async def test_what_comes_during_a_scan_is_counted_too(pond: Pond, stock: Stock) -> None:
    await fill(stock)
    async with pond.working("invalidation"), pond.client() as client:
        await forget(client, tags=["x"])
        first, second, third = await asyncio.gather(
            *(
                client.invalidate(wait=20.0, **what)
                for what in ({"tags": ["doc:1"]}, {"prefix": "doc:"}, {"model": "m"})
            )
        )
    assert [(one.l2, one.l3) for one in (first, second, third)] == [(2, 2), (2, 2), (2, 2)]


async def test_an_inquiry_is_no_invalidation(pond: Pond, stock: Stock) -> None:
    await fill(stock)
    async with pond.working("invalidation"), pond.client() as client:
        before = pond.redis.hgetall(pond.all_names()[0].tags)
        await client.invalidate(tags=["doc:1"], dry_run=True)
        assert pond.redis.hgetall(pond.all_names()[0].tags) == before


async def test_nobody_to_count_is_said(pond: Pond, stock: Stock) -> None:
    async with pond.client() as client:
        found = await client.invalidate(tags=["a"], wait=0.05)
        assert (found.complete, found.l2, found.l3) == (False, None, None)
        with pytest.raises(DeadlineExceeded, match="worker invalidation"):
            await client.invalidate(tags=["a"], dry_run=True, wait=0.05)


async def test_an_inquiry_before_any_worker_has_started_leaves_nothing(pond: Pond) -> None:
    async with pond.client() as client:
        with pytest.raises(Unavailable, match="millpond up"):
            await client.invalidate(tags=["a"], dry_run=True)
    assert not pond.found("*invalidations")


async def test_without_a_database_l2_is_swept_and_l3_is_none(pond: Pond) -> None:
    pond.options |= {"l3": False}
    shelf = Shelf(pond)
    async with pond.working("invalidation"), pond.client() as client:
        shelf.put(1, "a")
        found = await client.invalidate(tags=["a"], wait=20.0)
        assert (found.l2, found.l3, found.complete) == (1, None, True)
    assert shelf.get(1) is None


async def test_a_landing_is_only_acknowledged(pond: Pond, stock: Stock) -> None:
    await stock.store(1)
    pond.redis.xadd(pond.all_names()[0].invalidations, {"by": "land", "tags": f"key:{key(1)}"})
    async with pond.working("invalidation"):
        await stock.worked_off()
    assert await stock.left() == {1}
    assert await stock.audit() == []


async def test_an_entry_written_by_other_hands_holds_up_nobody(pond: Pond, stock: Stock) -> None:
    await fill(stock)
    names = pond.all_names()[0]
    async with pond.working("invalidation"), pond.client() as client:
        strange = {"by": b"\xff\0", "tags": b"\0\nkey:short\nprefix:\n\xff\ndoc:2", "reason": b"\0"}
        for said in (strange, {"count": b"\0", "by": b""}, {"what": "ever"}):
            pond.redis.xadd(names.invalidations, said)
        assert await forget(client, tags=["doc:1"]) == (2, 2)
        await stock.worked_off()
    assert 2 not in await stock.left_in_l3()


async def test_what_the_log_lost_unseen_is_swept_all_the_same(pond: Pond, stock: Stock) -> None:
    """The log is trimmed past entries that no invalidation worker has read."""
    names = pond.all_names()[0]
    async with pond.working("invalidation"), pond.client() as client:
        await client.invalidate(tags=["x"], wait=20.0)
        await stock.worked_off()
        await fill(stock)
        pipe = pond.redis.pipeline()  # in one step, so that the worker sees none of it
        pipe.hset(names.tags, mapping={"doc:1": "9999999999998-0", "prefix:": "0-0", "#last": "9999999999999-0"})
        pipe.xadd(names.invalidations, {"by": "t", "tags": "doc:1"}, id="9999999999998-0")
        pipe.xadd(names.invalidations, {"by": "t", "tags": "nothing"}, id="9999999999999-0")
        pipe.execute_command("XTRIM", names.invalidations, "MAXLEN", "=", 1)
        pipe.execute()
        await eventually(lambda: is_left(stock, set(ANSWERS) - {1, 5}), "both tiers are swept")


async def test_many_answers_of_one_tag_are_swept_in_steps(pond: Pond, stock: Stock) -> None:
    pipe = pond.redis.pipeline()
    for number in range(2000):
        names = stock.names(number)
        pipe.set(names.entry(key(number)), stock.text("a" if number % 2 else "b", *[f"t:{n}" for n in range(40)]))
        pipe.expire(names.entry(key(number)), 600)
    pipe.execute()
    await stock.database.fetch(
        "INSERT INTO answers (key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile, "
        "tenant, model, bytes, entry) SELECT decode(lpad(to_hex(n), 8, '0') || repeat('0', 24), 'hex'), 0, 1, 0, "
        "now(), now(), now(), now(), ARRAY[CASE n % 2 WHEN 0 THEN 'b' ELSE 'a' END], 'p', 't', 'm', 0, '' "
        "FROM generate_series(0, 44999) n"
    )
    async with pond.working("invalidation"), pond.client() as client:
        assert await forget(client, tags=["a"]) == (1000, 22500)
        assert await forget(client, everything=True) == (1000, 22500)


def test_a_tally_counts_for_the_oldest_that_matches() -> None:
    log = [LogEntry("5-0", ("a",)), LogEntry("3-0", ("b", "prefix:a")), LogEntry("9-0", ("all",))]
    tally = Tally(log)
    tally.add("k", (1, 0), ["ab"])
    tally.add("k", (4, 0), ["ab", "a"])
    tally.add("k", (6, 0), ["a"])
    tally.add("k", (9, 0), ["a"])
    assert dict(tally.counts) == {"3-0": 1, "5-0": 1, "9-0": 1}


async def test_an_entry_whose_head_is_long_is_judged_by_all_of_it(pond: Pond) -> None:
    names, shelf = PartitionKeys(0), Shelf(pond)
    shelf.put(1, *[f"{n}:{'x' * 100}" for n in range(30)], "last")
    shelf.put(2, *[f"{n}:{'x' * 100}" for n in range(30)])
    shelf.invalidate(1, "last")
    link = Link(pond.url)
    try:
        await link.call(SCRIPTS["sweep"].call([names.tags, names.entry(key(1)), names.entry(key(2))], ["delete", ""]))
    finally:
        await link.close()
    assert (shelf.get(1) is None, shelf.get(2) is None) == (True, False)
    pond.redis.delete(names.tags)
