"""Promotion: what is hit stays in L2, for longer the longer it has been wanted, and never past its own end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import keys
from tests import faults_support
from tests.faults_support import Pond
from tests.shelf import DAY_MS, HOUR_MS, PROBATION_MS, Shelf
from workers.consumer import Message
from workers.promotion import hits_of, life_ms

pond = faults_support.pond

#: How long a promotion may take, in milliseconds: what a remaining life is compared within.
SLACK_MS = 5_000

ages = st.integers(0, 365 * DAY_MS)
counts = st.integers(1, 10**9)


@pytest.fixture
def shelf(pond: Pond) -> Iterator[Shelf]:
    yield Shelf(pond)
    pond.redis.delete(*(names.tags for names in pond.all_names()))


# the policy


@given(ages, ages, counts, counts)
def test_an_older_or_hotter_entry_never_lives_shorter(age: int, older: int, hits: int, more: int) -> None:
    assert life_ms(age + older, hits, PROBATION_MS) >= life_ms(age, hits, PROBATION_MS)
    assert life_ms(age, hits + more, PROBATION_MS) >= life_ms(age, hits, PROBATION_MS)


@given(ages, counts)
def test_a_life_is_the_probation_and_the_age_at_least(age: int, hits: int) -> None:
    assert life_ms(age, hits, PROBATION_MS) >= PROBATION_MS + age
    assert life_ms(-age, hits, PROBATION_MS) >= PROBATION_MS


def test_one_hit_at_an_hour_of_age_is_worth_an_hour_and_the_probation() -> None:
    assert life_ms(HOUR_MS, 1, PROBATION_MS) == HOUR_MS + PROBATION_MS
    assert life_ms(HOUR_MS, 8, PROBATION_MS) == 4 * (HOUR_MS + PROBATION_MS)


# reports


def test_the_hits_of_all_tiers_and_reports_count_together() -> None:
    one, two = f"{1:032x}", f"{2:032x}"
    reports = [(b"5-0", b'{"keys":{"%b":[1,2,3]}}'), (b"9-1", b'{"keys":{"%b":[1,0,0],"%b":[0,0,4]}}')]
    filled = [
        Message(reports[0][0], {b"data": reports[0][1] % one.encode()}),
        Message(reports[1][0], {b"data": reports[1][1] % (one.encode(), two.encode())}),
    ]
    hits, unreadable = hits_of(filled)
    assert {k: (h.count, h.at_ms) for k, h in hits.items()} == {one: (7, 9), two: (4, 9)}
    assert unreadable == 0


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"7", b'{"keys":[]}', b'{"keys":{"%b":["x"]}}', b'{"keys":{"%b":7}}', b'{"keys":null}']
)
def test_a_report_that_is_none_is_counted_and_names_nothing(data: bytes) -> None:
    text = data.replace(b"%b", b"0" * 32)
    assert hits_of([Message(b"1-0", {b"data": text}), Message(b"2-0", {})]) == ({}, 2)


def test_what_is_no_key_is_not_looked_for() -> None:
    names = {"short": [1], "z" * 32: [1], "0" * 32: [0, 0, 0]}
    assert hits_of([Message(b"1-0", {b"data": str({"keys": names}).replace("'", '"').encode()})])[0] == {}


# the worker


async def test_a_hit_prolongs_the_life_of_what_is_on_probation(pond: Pond, partitions: int, shelf: Shelf) -> None:
    for number in range(8):
        shelf.put(number, age_ms=HOUR_MS)
    async with pond.working("promotion"):
        for number in range(7):
            shelf.report({number: [0, 1, 0]})
        await shelf.handled()
    for number in range(7):
        assert PROBATION_MS + HOUR_MS - SLACK_MS < shelf.left_ms(number) <= PROBATION_MS + HOUR_MS + SLACK_MS
    assert shelf.left_ms(7) <= PROBATION_MS, "nobody hit it"


async def test_the_script_grants_what_the_policy_says(pond: Pond, shelf: Shelf) -> None:
    for number, hits in enumerate((1, 2, 100)):
        shelf.put(number, age_ms=7_000 * number)
        shelf.report({number: [hits, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    (reports,) = [pond.redis.xrange(pond.all_names()[0].touches)]
    for number, hits in enumerate((1, 2, 100)):
        at_ms = int(reports[number][0].split(b"-")[0])
        created = int(shelf.get(number).split(b" ")[2])  # type: ignore[union-attr]
        assert abs(shelf.leaves_at(number) - at_ms - life_ms(at_ms - created, hits, PROBATION_MS)) <= 2


async def test_each_profile_has_its_own_probation(pond: Pond, shelf: Shelf) -> None:
    pond.options |= {"profiles": {"brief": {"probation": 60.0}}}
    text = shelf.text().replace(b"profile:response", b"profile:brief")
    pond.redis.set(shelf.names(1).entry(f"{1:08x}{'0' * 24}"), text, px=1000)
    shelf.report({1: [0, 1, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert 60_000 - SLACK_MS < shelf.left_ms(1) <= 60_000 + SLACK_MS


async def test_a_life_is_never_shortened(pond: Pond, shelf: Shelf) -> None:
    shelf.put(1, left_ms=20 * HOUR_MS)
    before = shelf.leaves_at(1)
    shelf.report({1: [0, 1, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.leaves_at(1) == before


async def test_nothing_outlives_its_own_end(pond: Pond, shelf: Shelf) -> None:
    text = shelf.put(1, left_ms=60_000, age_ms=HOUR_MS, ttl_ms=HOUR_MS + 300_000)
    shelf.report({1: [1000, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    created, ttl = (int(part) for part in text.split(b" ")[2:4])
    assert shelf.leaves_at(1) == created + ttl


@pytest.mark.parametrize("tag", ["doc:1", "all", f"key:{1:08x}{'0' * 24}"])
async def test_what_was_invalidated_is_removed_and_not_kept(pond: Pond, shelf: Shelf, tag: str) -> None:
    shelf.put(1, "doc:1")
    shelf.put(2, "doc:2", epoch="9999999999999-0")
    shelf.invalidate(1, tag)
    shelf.report({1: [5, 5, 5], 2: [1, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.get(1) is None
    assert shelf.get(2) is not None


async def test_what_cannot_be_read_is_removed(pond: Pond, shelf: Shelf) -> None:
    pond.redis.set(shelf.names(1).entry(f"{1:08x}{'0' * 24}"), b"mp9 rubbish", px=60_000)
    shelf.report({1: [1, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.get(1) is None


async def test_an_entry_with_very_many_tags_is_promoted_like_any_other(pond: Pond, shelf: Shelf) -> None:
    shelf.put(1, *(f"document:{n:090}" for n in range(500)), left_ms=1000)
    shelf.report({1: [1, 0, 0]})
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.left_ms(1) > PROBATION_MS - SLACK_MS


async def test_a_report_that_cannot_be_read_holds_up_no_other_and_stays_for_the_other_group(
    pond: Pond, shelf: Shelf
) -> None:
    touches = shelf.names(1).touches
    pond.redis.xadd(touches, {"data": b"{"})
    shelf.put(1, left_ms=1000)
    shelf.report({1: [1, 0, 0]})
    pond.redis.xgroup_create(touches, keys.PERSISTENCE_GROUP, "0")
    async with pond.working("promotion"):
        await shelf.handled()
    assert shelf.left_ms(1) > PROBATION_MS - SLACK_MS
    assert pond.stat("touches_lost") == 1
    assert len(pond.redis.xreadgroup(keys.PERSISTENCE_GROUP, "w", {touches: ">"})[0][1]) == 2
    pond.redis.xgroup_destroy(touches, keys.PERSISTENCE_GROUP)


async def test_reports_of_thousands_of_keys_are_worked_off(pond: Pond, shelf: Shelf) -> None:
    for number in range(1500):
        shelf.put(number, left_ms=60_000)
    shelf.report({number: [1, 0, 0] for number in range(1500)})
    async with pond.working("promotion"):
        await shelf.handled()
    assert pond.stat("promoted") == 1500
    assert min(shelf.left_ms(number) for number in range(1500)) > PROBATION_MS - 2 * SLACK_MS
