"""What an application stores itself comes back as it was, is forgotten when it should be, and never comes too late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from millpond import Found, InvalidRequest, MillpondError, Superseded, Unavailable
from shared.keys import PartitionKeys
from shared.values import decode, encode, split
from tests import faults_support
from tests.databases import Database
from tests.faults_support import Pond, until
from tests.proxy import Proxy

pond = faults_support.pond

QUERY = {"query": "What is a head race?", "top_n": 5}
VALUES: dict[str, Any] = {
    "null": None,
    "zero": 0,
    "false": False,
    "an empty text": "",
    "a text": "é\n\x00#3\n{}",
    "an empty list": [],
    "an object": {"kind": "bytes", "deep": [{"x": 1.5}], "error": {"code": "internal"}},
    "what describes bytes": {"kind": "bytes"},
    "no bytes": b"",
    "bytes": b'#12\n{"error"\x00\xff\n',
    "a vector": np.arange(5, dtype=np.float32) / 3,
    "a matrix, columns first": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big-endian": np.arange(4, dtype=">i4"),
    "booleans": np.array([[True], [False]]),
    "halves": np.array([0.5, -1], dtype=np.float16),
    "complex": np.array([1 + 2j]),
    "no rows": np.empty((0, 4), np.float32),
    "an array without dimensions": np.array(0.5),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and bool(one == other)


async def test_every_value_comes_back_as_it_was_from_every_tier(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        for name, value in VALUES.items():
            await client.put("retrieval", {"of": name}, value)
        found = [[await client.get("retrieval", {"of": name}) for name in VALUES] for _ in range(2)]
    for tier, values in zip(("l2", "l1"), found, strict=True):
        assert {one.tier for one in values} == {tier}
        for (name, value), one in zip(VALUES.items(), values, strict=True):
            assert one
            assert same(value, one.value), name


def test_an_array_read_is_a_copy_that_may_be_written_to() -> None:
    encoded = encode(np.zeros(3))
    encoded.decoded()[0] = 1
    assert encoded.decoded()[0] == 0


@pytest.mark.parametrize(
    "value",
    [object(), {1j: 2}, {1: "a key that is no text"}, np.array([object()]), float],
    ids=["an object", "a complex key", "a key that is a number", "an array of objects", "a type"],
)
def test_what_cannot_be_stored_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        encode(value)
    assert refused.value.field == "value"


@pytest.mark.parametrize(
    "about",
    [
        {"kind": "array", "dtype": "<f4", "shape": [3]},
        {"kind": "array", "dtype": "O", "shape": [1]},
        {"kind": "array", "dtype": "<f4", "shape": "x"},
        {"kind": "array", "dtype": "<f4", "shape": ["x"]},
        {"kind": "song"},
        {},
    ],
    ids=str,
)
def test_a_damaged_value_is_an_error_that_says_so(about: dict[str, Any]) -> None:
    with pytest.raises(MillpondError):
        decode(about, b"12345678")


def test_a_payload_is_split_where_its_json_ends() -> None:
    assert split(b'{"a":1}') == (b'{"a":1}', None)
    assert split(encode(b"#1\n").payload({"a": 1})) == (b'{"a":1,"body":{"kind":"bytes"}}', b"#1\n")


# finding


async def test_a_miss_is_false_and_an_empty_value_is_not(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup"), pond.client() as client:
        missed = await client.get("retrieval", QUERY)
        assert not missed
        assert missed.epoch
        assert missed == Found(hit=False, value=None, epoch=missed.epoch)
        assert not await client.exists("retrieval", QUERY)
        assert await client.info("retrieval", QUERY) is None
        key = await client.put("retrieval", QUERY, [], epoch=missed.epoch, ttl=100)
        found = await client.get("retrieval", QUERY)
        assert (found.hit, found.value, found.key, found.stale, found.degraded) == (True, [], key, False, False)
        assert 0 < (found.ttl or 0) <= 100
        assert await client.exists("retrieval", QUERY)
        assert not await client.exists("retrieval", QUERY, tenant="other")
        assert not await client.exists("market", QUERY)


async def test_info_tells_what_is_stored_without_the_value(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup"), pond.client() as client:
        key = await client.put("context", QUERY, b"x" * 1000, tags=["user:7"], scope={"user": "7"})
        about = await client.info("context", QUERY, scope={"user": "7"})
    assert about is not None
    assert (about.key, about.model, about.provider) == (key, "application", "application")
    assert about.tags == ("profile:context", "tenant:default", "model:application", "user:7")
    assert about.size is not None and 1000 < about.size < 1400
    assert 3500 < about.ttl <= 3600
    assert pond.redis.exists(PartitionKeys(about.partition).entry(key))


async def test_what_is_put_replaces_what_every_worker_holds(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup"), pond.working("lookup"), pond.client() as client:
        for n in range(5):
            await client.put("retrieval", QUERY, n)
            assert {(await client.get("retrieval", QUERY)).value for _ in range(20)} == {n}


async def test_what_is_put_replaces_what_only_a_workers_memory_holds(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        key = await client.put("retrieval", QUERY, "old")
        assert (await client.get("retrieval", QUERY)).value == "old"
        pond.redis.delete(PartitionKeys(0).entry(key))  # its probation is over
        assert (await client.get("retrieval", QUERY)).tier == "l1"
        await client.put("retrieval", QUERY, "new")
        assert (await client.get("retrieval", QUERY)).value == "new"


@pytest.mark.parametrize("args", ["", " ", [], {}, None, 7], ids=repr)
async def test_what_nothing_depends_on_is_refused(pond: Pond, args: Any) -> None:
    async with pond.working("lookup"), pond.client() as client:
        with pytest.raises(InvalidRequest, match="input"):
            await client.get("retrieval", args)
        with pytest.raises(InvalidRequest, match="input"):
            await client.put("retrieval", args, 1)


async def test_a_new_value_stays_for_its_probation_only_if_postgresql_will_have_it(pond: Pond) -> None:
    names = PartitionKeys(0)
    async with pond.working("lookup"), pond.client() as client:
        key = await client.put("retrieval", QUERY, 1)
        whole = pond.redis.pttl(names.entry(key))
        pond.redis.execute_command("XGROUP", "CREATE", names.landed, "persistence", "0", "MKSTREAM")
        await client.put("retrieval", QUERY, 2)
        assert pond.redis.pttl(names.entry(key)) <= 600_000 < whole <= 86_400_000
        ((_, told),) = pond.redis.xrange(names.landed)
        assert (told[b"key"], told[b"outcome"]) == (key.encode(), b"stored")
        assert told[b"entry"] == pond.redis.get(names.entry(key))


# forgetting


async def test_what_was_deleted_is_gone_from_every_tier(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup"), pond.client() as client:
        await client.put("retrieval", QUERY, 1)
        await client.put("retrieval", "another", 2)
        for _ in range(2):
            assert await client.get("retrieval", QUERY)
        await client.delete("retrieval", QUERY)
        assert not await client.get("retrieval", QUERY)
        assert await client.get("retrieval", "another")


@pytest.mark.parametrize(
    "what", [{"tags": ["doc:1"]}, {"profile": "retrieval"}, {"model": "application"}, {"everything": True}], ids=str
)
async def test_a_put_that_began_before_an_invalidation_is_refused(
    pond: Pond, partitions: int, what: dict[str, Any]
) -> None:
    async with pond.working("lookup"), pond.client() as client:
        missed = await client.get("retrieval", QUERY)
        await client.invalidate(**what)
        with pytest.raises(Superseded):
            await client.put("retrieval", QUERY, "stale", tags=["doc:1"], epoch=missed.epoch)
        assert not await client.get("retrieval", QUERY)
        again = await client.get("retrieval", QUERY)
        await client.put("retrieval", QUERY, "fresh", tags=["doc:1"], epoch=again.epoch)
        assert (await client.get("retrieval", QUERY)).value == "fresh"


async def test_an_invalidation_of_something_else_refuses_no_put(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        missed = await client.get("retrieval", QUERY)
        await client.invalidate(tags=["doc:2"])
        await client.put("retrieval", QUERY, 1, tags=["doc:1"], epoch=missed.epoch)
        assert await client.get("retrieval", QUERY)


async def test_an_older_put_never_replaces_a_newer_one(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        old = await client.get("retrieval", QUERY)
        await client.invalidate(tags=["doc:2"])
        await client.put("retrieval", QUERY, "newer", tags=["doc:1"])
        with pytest.raises(Superseded, match="newer"):
            await client.put("retrieval", QUERY, "older", tags=["doc:1"], epoch=old.epoch)
        assert (await client.get("retrieval", QUERY)).value == "newer"


async def test_an_epoch_older_than_the_pruned_markers_is_refused(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        missed = await client.get("retrieval", QUERY)
        ids = await client.invalidate(tags=["doc:2"])
        pond.redis.hset(PartitionKeys(0).tags, "#pruned", ids[0])
        with pytest.raises(Superseded):
            await client.put("retrieval", QUERY, 1, epoch=missed.epoch)
        await client.put("retrieval", QUERY, 2, epoch=ids[0])


async def test_an_epoch_of_no_invalidation_is_refused_by_name(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        with pytest.raises(InvalidRequest) as refused:
            await client.put("retrieval", QUERY, 1, epoch="yesterday")
        assert refused.value.field == "epoch"


# what else goes wrong


async def test_a_put_cut_after_it_ran_is_stored_once_more_and_returns(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy, pond.working("lookup"), pond.client(proxy.url) as client:
        await client.get("retrieval", QUERY)
        proxy.cut_after(lambda data: b"a value" in data)
        await client.put("retrieval", QUERY, "a value")
        assert proxy.cuts == 1
        assert (await client.get("retrieval", QUERY)).value == "a value"


async def test_values_outlive_redis_in_postgresql(pond: Pond, database: Database) -> None:
    pond.options |= {"database_url": database.url, "background_lease": 1.0}
    async with pond.client() as client:
        async with pond.working("lookup", "persistence"):
            for name, value in VALUES.items():
                await client.put("retrieval", {"of": name}, value, tags=["values"])
            await client.get_or_compute("retrieval", "computed", lambda: b"flour", tags=["values"])
            await until(lambda: not pond.length("landed"), "all are in PostgreSQL")
        for entry in pond.found("{mp:*}:entry:*"):
            pond.redis.delete(entry)
        async with pond.working("lookup", l3_timeout=10.0):
            found = [await client.get("retrieval", {"of": name}) for name in VALUES]
            assert {one.tier for one in found} == {"l3"}
            assert all(same(value, one.value) for value, one in zip(VALUES.values(), found, strict=True))
            assert await client.get_or_compute("retrieval", "computed", lambda: b"another") == b"flour"
            await client.invalidate(tags=["values"])
            assert not await client.get("retrieval", {"of": "bytes"})


async def test_a_put_without_a_server_says_so(pond: Pond) -> None:
    async with Proxy.to(pond.url) as proxy, pond.client(proxy.url) as client:
        proxy.refuse = True
        await proxy.cut()
        with pytest.raises(Unavailable):
            await client.put("retrieval", QUERY, 1)
