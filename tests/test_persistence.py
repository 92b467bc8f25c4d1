"""The persistence worker, undisturbed: every row as it should be, whatever order and company it comes in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from shared import keys
from shared.entry import unpack
from shared.envelope import Unreadable
from shared.errors import ConfigError
from shared.keys import PartitionKeys
from shared.scripts import SCRIPTS
from shared.touches import BOUNDS
from tests import faults_support
from tests.faults_support import Pond, until
from tests.persistence_support import call_of, count, entry_of, is_written, key_of, lag, land, rows, touch
from workers.records import hit_rows, read_landed, read_touches, top_rows

pond = faults_support.pond
K = PartitionKeys(0)


@asynccontextmanager
async def writing(pond: Pond, database: Any) -> AsyncIterator[None]:
    """Run a persistence worker; leave when it has written everything."""
    async with pond.working("persistence", database_url=database.url):
        yield
        await until(lambda: is_written(pond), "everything is written")


@pytest.mark.every_postgresql
async def test_an_answer_lands_with_every_field_of_its_envelope(pond: Pond, database: Any) -> None:
    async with writing(pond, database):
        land(pond, 1, prompt=orjson.dumps({"messages": [{"role": "user", "content": "a\0b"}]}))
    ((row),) = await rows(database.url, "SELECT * FROM answers")
    ((names),) = await rows(
        database.url,
        "SELECT array_agg(column_name::text ORDER BY ordinal_position) FROM information_schema.columns "
        "WHERE table_name = 'answers'",
    )
    found = dict(zip(names[0], row, strict=True))
    assert found["entry"] == entry_of(1)
    assert unpack(found["key"].hex(), found["entry"]).tokens == (10, 20)
    assert (found["epoch_ms"], found["epoch_seq"], found["partition"]) == (1, 0, 0)
    assert found["tags"] == ["profile:response", "tenant:default", "model:m"]
    assert [found[name] for name in ("profile", "tenant", "model", "provider", "endpoint")] == [
        "response", "default", "m", "simulated", "chat",
    ]  # fmt: skip
    times = [found[name].timestamp() for name in ("created", "fresh", "expires", "gone")]
    assert times == [1_760_000_000, 1_760_000_060, 1_760_000_061, 1_760_000_063]
    assert (found["cost"], found["compute_ms"], found["bytes"]) == (0.5, 7, len(entry_of(1)))
    assert "a\\ufffdb" in found["prompt"] or "a\ufffdb" in found["prompt"]


async def test_a_put_is_only_an_entry_and_an_error_is_only_a_call(pond: Pond, database: Any) -> None:
    async with writing(pond, database):
        land(pond, 1, call=None)
        land(pond, 2, entry=None, outcome="rate_limited")
    assert await rows(database.url, "SELECT key, endpoint FROM answers") == [(bytes.fromhex(key_of(1)), None)]
    assert await rows(database.url, "SELECT key, outcome FROM calls") == [(bytes.fromhex(key_of(2)), "rate_limited")]


async def test_each_attempt_is_a_call_and_the_last_one_has_the_cost(pond: Pond, database: Any) -> None:
    attempts = [
        {"provider": "a", "model": "m1", "outcome": "rate_limited", "duration_ms": 5},
        {"provider": "b", "model": "m2", "outcome": "ok", "duration_ms": 6},
    ]
    async with writing(pond, database):
        land(pond, 1, call=call_of(attempts=attempts, kind="refresh", experiment="e", variant="v"))
    found = await rows(
        database.url,
        "SELECT attempt, provider, model, kind, outcome, completion_tokens, cost, duration_ms FROM calls "
        "ORDER BY attempt",
    )
    assert found == [
        (0, "a", "m1", "refresh", "rate_limited", 0, None, 5),
        (1, "b", "m2", "refresh", "stored", 20, 0.5, 6),
    ]
    assert await rows(database.url, "SELECT name, variant FROM experiments") == [("e", "v")]


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one after the other"])
@pytest.mark.parametrize("newer_first", [True, False])
async def test_an_older_epoch_never_overwrites_a_newer_one(
    pond: Pond, database: Any, together: bool, newer_first: bool
) -> None:
    versions = [("9-0", 1), ("10-0", 0), ("10-2", 5), ("10-2", 6)]  # (epoch, created): each newer than the one before
    order = list(reversed(versions)) if newer_first else versions
    messages = [entry_of(created_ms=created, epoch=epoch) for epoch, created in order]
    for entry in messages[: None if together else 0]:
        land(pond, 0, entry=entry)
    async with writing(pond, database):
        for entry in messages[len(messages) if together else 0 :]:
            land(pond, 0, entry=entry)
            await until(lambda: is_written(pond), "it is written before the next comes")
    assert await rows(database.url, "SELECT epoch_ms, epoch_seq, entry FROM answers") == [
        (10, 2, entry_of(created_ms=6, epoch="10-2"))
    ]
    assert await count(database.url, "calls") == 4


async def test_what_began_before_the_pruned_horizon_is_dropped(pond: Pond, database: Any) -> None:
    await rows(database.url, "INSERT INTO floors VALUES (0, 10, 1)")
    async with writing(pond, database):
        for number, epoch in enumerate(("9-9", "10-0", "10-1", "11-0")):
            land(pond, number, entry=entry_of(number, epoch=epoch))
    assert await rows(database.url, "SELECT epoch_ms, epoch_seq FROM answers ORDER BY 1, 2") == [(10, 1), (11, 0)]
    assert await count(database.url, "calls") == 4, "what was spent was spent"


@pytest.mark.every_postgresql
async def test_hits_of_an_hour_add_up(pond: Pond, database: Any) -> None:
    async with writing(pond, database):
        touch(pond, 3, keys=[1, 2], experiment="e", variant="v")
        await until(lambda: not lag(pond, "touches") and not pond.pending("touches"), "the first is counted")
        touch(pond, 4, keys=[1], experiment="e", variant="v")
        touch(pond, 1, keys=[3], experiment="e", variant="v")
        touch(pond, 5, tier="llm")
    found = await rows(
        database.url,
        "SELECT tier, experiment, sum(hits), sum(prompt_tokens), sum(cost), sum(saved_ms), sum(histogram[1]), "
        "max(cardinality(histogram)) FROM hits GROUP BY 1, 2 ORDER BY 1",
    )
    assert found == [
        ("l1", "e", 8, 80, 0.75, 300, 8, len(BOUNDS) + 1),
        ("llm", "", 5, 50, 0.25, 100, 5, len(BOUNDS) + 1),
    ]
    top = await rows(database.url, "SELECT key, sum(hits) FROM top_keys GROUP BY 1 ORDER BY 2 DESC")
    assert top == [(bytes.fromhex(key_of(1)), 7), (bytes.fromhex(key_of(2)), 3), (bytes.fromhex(key_of(3)), 1)]
    assert pond.length("touches") == 4, "they stay for the other group"


async def test_a_report_that_comes_again_is_not_counted_again(pond: Pond, database: Any) -> None:
    async with writing(pond, database):
        touch(pond, 3, keys=[1])
    pond.redis.xgroup_destroy(K.touches, keys.PERSISTENCE_GROUP)
    async with writing(pond, database):
        await until(lambda: pond.redis.xinfo_groups(K.touches), "the group is made anew, from the beginning")
        await until(lambda: not lag(pond, "touches") and not pond.pending("touches"), "it was read again")
    assert await rows(database.url, "SELECT sum(hits) FROM hits") == [(3,)]
    assert await rows(database.url, "SELECT sum(hits) FROM top_keys") == [(3,)]


#: What is wrong with a message of `landed`, and what the dead letter says of it.
SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"key": None}, "no field"),
    "a short key": ({"key": "ab"}, "no key"),
    "no outcome": ({"outcome": None}, "no field"),
    "no entry and no call": ({"entry": None, "call": None}, "neither"),
    "an entry of another version": ({"entry": b"mp9 1-0 1 1 1 1 0\n{}\n"}, "version"),
    "an entry of the year 99999": ({"entry": entry_of(created_ms=10**18)}, "no time"),
    "a call that is no JSON": ({"call": b"{"}, "call is not JSON"),
    "a call without a tenant": ({"call": orjson.dumps({"profile": "p"})}, "no field 'tenant'"),
    "a call of three tokens": ({"call": call_of(tokens=[1, 2, 3])}, "too many values"),
    "a call with too many tokens": ({"call": call_of(tokens=[1 << 40, 0])}, "no count"),
    "a call that costs a word": ({"call": call_of(cost="much")}, "no sum of money"),
    "a text PostgreSQL does not keep": ({"call": call_of(tenant="a\0b")}, "PostgreSQL refuses"),
    "an outcome that is no text": ({"outcome": b"\xff"}, "decode"),
}


@pytest.mark.every_postgresql
async def test_bad_messages_are_buried_at_once_and_keep_nothing_from_the_table(pond: Pond, database: Any) -> None:
    for number, (fields, _) in enumerate(SPOILT.values()):
        land(pond, number)
        land(pond, 100, **fields)
    async with writing(pond, database):
        pass
    assert await count(database.url, "answers") == await count(database.url, "calls") == len(SPOILT)
    letters = [letter for _, letter in pond.redis.xrange(K.dead)]
    reasons = [letter[b"reason"].decode() for letter in letters]
    missing = [name for name, (_, said) in SPOILT.items() if not any(said in reason for reason in reasons)]
    assert missing == [], reasons
    assert [letter[b"deliveries"] for letter in letters] == [b"1"] * len(SPOILT)


async def test_bad_reports_are_buried_and_the_others_count(pond: Pond, database: Any) -> None:
    spoilt = [b"{", b"[]", b'{"stats":[[1]]}', b'{"keys":{"k":[1]}}', b'{"stats":[7]}', b'{"stats":7}', b'{"keys":[]}']
    for data in spoilt:
        pond.redis.xadd(K.touches, {"data": data})
        touch(pond, 2)
    async with writing(pond, database):
        pass
    assert await rows(database.url, "SELECT sum(hits) FROM hits") == [(2 * len(spoilt),)]
    assert pond.redis.xlen(K.dead) == len(spoilt)


async def test_a_day_without_a_partition_gets_one_at_the_next_start(pond: Pond, database: Any) -> None:
    drop = "SELECT 'DROP TABLE ' || child FROM (SELECT inhrelid::regclass::text AS child FROM pg_inherits) AS c"
    async with writing(pond, database):
        await until(lambda: pond.redis.exists(K.landed), "it is past its start")
        for (statement,) in await rows(database.url, f"{drop} WHERE child ~ '^calls_[0-9]+$'"):
            await rows(database.url, statement)
        land(pond, 1)
    assert await count(database.url, "calls_default") == 1
    async with writing(pond, database):
        land(pond, 2)
    assert await count(database.url, "calls_default") == 0
    assert await count(database.url, "calls") == 2


async def test_many_partitions_are_written_at_once_and_apart(pond: Pond, database: Any, partitions: int) -> None:
    for number in range(2000):
        land(pond, number)
    async with writing(pond, database):
        pass
    assert await count(database.url, "answers") == await count(database.url, "calls") == 2000
    found = await rows(database.url, "SELECT DISTINCT partition FROM answers ORDER BY 1")
    assert [partition for (partition,) in found] == list(range(partitions))


async def test_the_streams_exist_before_anything_landed(pond: Pond, database: Any, partitions: int) -> None:
    async with writing(pond, database):
        for names in pond.all_names():
            for stream in (names.landed, names.touches):
                assert [group["name"] for group in pond.redis.xinfo_groups(stream)] == [b"persistence"]


async def test_without_a_database_it_does_not_start(pond: Pond) -> None:
    with pytest.raises(ConfigError, match="MILLPOND_DATABASE_URL"):
        async with pond.working("persistence"):
            pass


def test_ack_and_hold_take_only_what_was_asked_and_is_owned(server: Any) -> None:
    with server.connect() as connection:
        for name in ("ack", "hold"):
            connection.script_load(SCRIPTS[name].source)
        connection.xgroup_create(K.touches, "g", "0", mkstream=True)
        ids = [connection.xadd(K.touches, {"a": "b"}) for _ in range(4)]
        connection.xreadgroup("g", "w", {K.touches: ">"}, count=3)
        connection.xreadgroup("g", "other", {K.touches: ">"})
        for name in ("hold", "ack"):
            call = SCRIPTS[name].call([K.touches], ["g", "w", ids[0], ids[2], ids[3]])
            assert connection.execute_command(*call) == 2
        left = connection.xpending_range(K.touches, "g", "-", "+", 10)
        assert [(one["message_id"], one["consumer"]) for one in left] == [(ids[1], b"w"), (ids[3], b"other")]
        assert connection.xlen(K.touches) == 4
        connection.flushall()
        for name in ("hold", "ack"):
            assert connection.execute_command(*SCRIPTS[name].call([K.touches], ["g", "w", "1-1"])) == 0


def test_reports_of_one_hour_are_summed_before_they_are_written() -> None:
    def report(at_ms: int, hits: int) -> Any:
        row = ["l2", "p", "t", "m", None, None, hits, 1, 2, 0.5, 3, [0] * len(BOUNDS) + [hits]]
        return read_touches(
            b"%d-0" % at_ms, {b"data": orjson.dumps({"keys": {key_of(1): [0, hits, 0]}, "stats": [row]})}
        )

    reports = [report(3_600_000, 1), report(3_600_001, 2), report(7_200_000, 1)]
    assert [(row.hour.hour, row.hits, row.cost, row.histogram[-3:]) for row in hit_rows(reports)] == [
        (1, 3, 1.0, ",3}"), (2, 1, 0.5, ",1}"),
    ]  # fmt: skip
    assert top_rows(reports, most=10) == [
        (datetime(1970, 1, 1, 1, tzinfo=UTC), bytes.fromhex(key_of(1)), 3),
        (datetime(1970, 1, 1, 2, tzinfo=UTC), bytes.fromhex(key_of(1)), 1),
    ]
    assert top_rows(reports, most=1)[0][2] == 3


def test_a_damaged_entry_is_unreadable_wherever_it_is_cut() -> None:
    whole = entry_of(body="word " * 200)
    for at in range(len(whole)):
        with pytest.raises(Unreadable):
            read_landed(0, b"1-0", {b"key": key_of(0).encode(), b"outcome": b"stored", b"entry": whole[:at]})
