"""L3 read-through: what left Redis comes back from PostgreSQL, judged by every invalidation since."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from producers.client import Client
from producers.reply import Reply
from shared.counters import Counters
from shared.entry import unpack
from shared.errors import NotCached
from shared.keys import PartitionKeys, partition_of
from shared.postgres import EmbeddedPostgres
from shared.scripts import SCRIPTS
from shared.tiers.l3 import L3
from tests import faults_support
from tests.conftest import Server
from tests.databases import Database
from tests.faults_support import Pond, answers, until
from tests.outages import Outage
from tests.proxy import Proxy
from tests.shelf import Shelf, key
from workers.following import Following

pond = faults_support.pond
FAST: dict[str, Any] = {"simulated_first_token": 0.01}
Q = "What is kept for good?"
ROW = """
INSERT INTO answers (key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile, tenant, model,
                     bytes, entry)
VALUES ($1, $2, 0, 0, now(), now(), now(), now() + make_interval(secs => $3), $4, 'response', 'default', 'm', 1, $5)
"""


async def keep(url: str, rows: Sequence[tuple[str, bytes]]) -> None:
    """Put entries into PostgreSQL by hand."""
    connection = await asyncpg.connect(url)
    try:
        await connection.executemany(
            ROW, [(bytes.fromhex(k), 0, 3600.0, list(unpack(k, text).tags), text) for k, text in rows]
        )
    finally:
        await connection.close()


async def forgotten_by_redis(pond: Pond, *prompts: str, **asked: Any) -> dict[str, bytes]:
    """Have answers computed, moved into PostgreSQL by hand, and dropped by L2; no worker holds them any more."""
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        found = await answers([client.ask(prompt, **asked) for prompt in prompts])
    rows = []
    for reply in found:
        name = PartitionKeys(partition_of(reply.key, pond.partitions)).entry(reply.key)
        rows.append((reply.key, pond.redis.get(name)))
        pond.redis.delete(name)
    await keep(pond.options["database_url"], rows)
    return dict(rows)


@asynccontextmanager
async def tier(url: str, **options: Any) -> AsyncIterator[L3]:
    """Open the tier alone."""
    opened = L3(url, Counters(), **({"timeout": 5.0} | options))
    try:
        yield opened
    finally:
        await opened.close()


async def test_what_left_redis_comes_back_and_goes_up_the_tiers(
    pond: Pond, database: Database, partitions: int
) -> None:
    prompts = [f"{Q} {n}" for n in range(12)]
    await forgotten_by_redis(pond, *prompts)
    async with pond.working("lookup"), pond.client() as client:
        found = await answers([client.ask(prompt) for prompt in prompts])
        assert {reply.tier for reply in found} == {"l3"}
        assert {reply.tier for reply in await answers([client.ask(prompt) for prompt in prompts])} == {"l1"}
    assert all(pond.redis.pttl(pond.names(prompt).entry(pond.key(prompt))) > 0 for prompt in prompts)
    assert pond.calls() == len(prompts)


async def test_an_answer_that_was_invalidated_since_is_not_served_from_postgresql(
    pond: Pond, database: Database
) -> None:
    await forgotten_by_redis(pond, Q, tags=["doc:1"])
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await client.invalidate(tags=["doc:1"])
        assert (await client.ask(Q, tags=["doc:1"])).tier == "llm"


async def test_an_invalidation_while_postgresql_is_asked_is_heeded(
    pond: Pond, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await forgotten_by_redis(pond, Q)
    asked, go_on = asyncio.Event(), asyncio.Event()
    find = L3.find

    async def held(self: L3, keys: Sequence[str]) -> dict[str, bytes]:
        found = await find(self, keys)
        assert found, "the row was read before the invalidation"
        asked.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(L3, "find", held)
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        waiting = asyncio.create_task(client.ask(Q))
        await asked.wait()
        await client.invalidate(everything=True)
        go_on.set()
        assert (await waiting).tier == "llm"
    assert pond.calls() == 2


async def test_hits_do_not_wait_for_a_slow_look_into_postgresql(
    pond: Pond, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def held(self: L3, keys: Sequence[str]) -> dict[str, bytes]:
        await go_on.wait()
        return {}

    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await client.ask("hot")
        monkeypatch.setattr(L3, "find", held)
        cold = asyncio.create_task(client.ask("cold"))
        await until(lambda: pond.pending("requests"), "the cold request is in hand")
        assert (await client.ask("hot")).tier in ("l1", "l2")
        assert not cold.done()
        go_on.set()
        assert (await cold).tier == "llm"


async def test_a_worker_killed_while_it_asks_postgresql_loses_nothing(
    pond: Pond, database: Database, partitions: int
) -> None:
    await forgotten_by_redis(pond, Q)
    async with pond.client() as client, pond.process("lookup", fault="kill@lookup_in_l3") as dying:
        waiting = asyncio.create_task(client.ask(Q))
        await asyncio.to_thread(dying.wait)
        async with pond.working("lookup"):
            assert (await waiting).tier == "l3"
    assert pond.calls() == 1


@pytest.mark.leaves("a frozen worker's message was taken over by the other")
async def test_a_worker_frozen_in_postgresql_past_its_lease_changes_nothing_when_it_thaws(
    pond: Pond, database: Database
) -> None:
    await forgotten_by_redis(pond, Q)
    async with pond.client() as client, pond.process("lookup", fault="stop@lookup_in_l3") as frozen:
        waiting = asyncio.create_task(client.ask(Q))
        await asyncio.to_thread(frozen.await_stopped)
        async with pond.working("lookup"):
            assert (await waiting).tier == "l3"
            await client.invalidate(everything=True)
            frozen.sigcont()
            await asyncio.to_thread(frozen.terminate)
        assert not pond.redis.exists(pond.names(Q).entry(pond.key(Q))) or not await _served(pond)


async def _served(pond: Pond) -> bool:
    k, key_ = pond.names(Q), pond.key(Q)
    with pond.redis.client() as connection:
        connection.script_load(SCRIPTS["fetch"].source)
        found = connection.execute_command(*SCRIPTS["fetch"].call([k.tags, k.entry(key_)], [key_, ""]))
    return isinstance(found[1], bytes)


async def test_lookups_do_without_postgresql_while_it_is_away(pond: Pond, own_database: EmbeddedPostgres) -> None:
    await forgotten_by_redis(pond, Q)
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        own_database.kill()
        assert (await client.ask("a new one")).tier == "llm"
        assert (await client.ask("another")).tier == "llm"
        own_database.restart()

        async with asyncio.timeout(20):
            while (found := await only_cached(client)) is None:
                pass  # as long as the breaker is open
        assert found.tier == "l3"


async def only_cached(client: Client) -> Reply | None:
    """Ask for what is stored, or nothing."""
    try:
        return await client.ask(Q, mode="only-if-cached")
    except NotCached:
        return None


async def test_requests_of_one_key_that_differ_in_their_directives_all_find_it(pond: Pond, database: Database) -> None:
    await forgotten_by_redis(pond, Q)
    async with pond.client() as client:
        asked = [asyncio.create_task(client.ask(Q, mode="only-if-cached", tags=tags)) for tags in ([], ["a"], ["b"])]
        await until(lambda: pond.length("requests") == 3, "one batch holds them")
        async with pond.working("lookup", l3_timeout=5.0):
            assert {reply.tier for reply in await answers(asked)} == {"l3"}


async def test_what_is_put_while_postgresql_is_asked_is_not_hidden_by_what_it_held(
    pond: Pond, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = ("retrieval", {"query": Q})
    async with pond.working("lookup"), pond.client() as client:
        key_ = await client.put(*what, "old")
    name = PartitionKeys(partition_of(key_, pond.partitions)).entry(key_)
    await keep(pond.options["database_url"], [(key_, pond.redis.get(name))])
    pond.redis.delete(name)
    asked, go_on = asyncio.Event(), asyncio.Event()
    find, follow = L3.find, Following.apply
    followed: list[Any] = []

    async def held(self: L3, keys: Sequence[str]) -> dict[str, bytes]:
        found = await find(self, keys)
        assert found, "the row was read before the put"
        asked.set()
        await go_on.wait()
        return found

    def noted(self: Following, log: list[Any]) -> None:
        follow(self, log)
        followed.extend(log[1:])

    monkeypatch.setattr(L3, "find", held)
    monkeypatch.setattr(Following, "apply", noted)
    async with pond.working("lookup", l3_timeout=5.0), pond.client() as client:
        waiting = asyncio.create_task(client.get(*what))
        await asked.wait()
        await client.put(*what, "new")
        await until(lambda: followed, "the worker has heard that L1 is to drop it")
        go_on.set()
        await waiting
        assert (await client.get(*what)).value == "new"


async def test_a_reply_from_postgresql_that_is_cut_off_goes_out_again(pond: Pond, database: Database) -> None:
    await forgotten_by_redis(pond, Q)
    sha = SCRIPTS["reply"].sha.encode()
    slow = {"lookup_lease": 30.0, "l3_timeout": 5.0}  # nobody waits for the lease
    async with Proxy.to(pond.url) as proxy, pond.working("lookup", url=proxy.url, **slow), pond.client() as client:
        proxy.cut_before(lambda data: sha in data)
        async with asyncio.timeout(15):
            assert (await client.ask(Q)).tier == "l3"
        assert proxy.cuts == 1


# the tier alone


async def test_the_breaker_opens_and_closes(own_database: EmbeddedPostgres) -> None:
    text = (b"mp2 0-0 1 1 0 0 0\n", b"{}")
    await keep_raw(own_database.url, key(1), text[0] + text[1])
    async with tier(own_database.url) as l3:
        assert list(await l3.find([key(1), key(2)])) == [key(1)]
        own_database.kill()
        assert await l3.find([key(1)]) == {}
        assert not l3.open
        own_database.restart()
        await until(lambda: l3.open, "the breaker lets one through")
        assert list(await l3.find([key(1)])) == [key(1)]


async def keep_raw(url: str, k: str, text: bytes) -> None:
    """Put anything into PostgreSQL."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(ROW, bytes.fromhex(k), 0, 3600.0, [], text)
    finally:
        await connection.close()


async def test_a_query_that_takes_too_long_is_given_up(database: Database) -> None:
    blocker = await asyncpg.connect(database.url)
    try:
        async with tier(database.url, timeout=0.3) as l3:
            assert await l3.find([key(1)]) == {}
            assert l3.open
            async with blocker.transaction():
                await blocker.execute("LOCK TABLE answers IN ACCESS EXCLUSIVE MODE")
                assert await l3.find([key(1)]) == {}
            assert not l3.open
    finally:
        await blocker.close()


async def test_nobody_waits_for_a_server_that_has_gone_silent(own_database: EmbeddedPostgres) -> None:
    async with Proxy(path=str(own_database.socket)) as proxy:
        url = f"postgresql://millpond@{proxy.url.removeprefix('redis://')}/millpond"
        async with tier(url, timeout=0.3) as l3:
            assert await l3.find([key(1)]) == {}
            assert l3.open
            proxy.delay = 3600
            for _ in range(3):  # in a query, then while connecting anew
                async with asyncio.timeout(3):
                    assert await l3.find([key(1)]) == {}
                assert not l3.open
                await until(lambda: l3.open, "the breaker lets one through")
            proxy.delay = 0
            await proxy.cut()
            async with asyncio.timeout(20):
                while not l3.open or await l3.find([key(1)]) or not l3.open:
                    await until(lambda: l3.open, "the breaker lets one through")


# rehydrate


@pytest.fixture
def shelf(server: Server, tmp_path: Any) -> Any:
    with server.connect() as connection:
        for script in SCRIPTS.values():
            connection.script_load(script.source)
        yield Shelf(Pond(server.url, connection, {"simulated_journal": tmp_path / "calls"}))


def rehydrate(shelf: Shelf, text: bytes, *, fence: str = "0", life: int = 60_000, asked: str = "") -> int | bytes:
    names = shelf.names(1)
    call = SCRIPTS["rehydrate"].call([names.tags, names.entry(key(1))], [fence, key(1), text, life, asked])
    (judged,) = shelf.redis.execute_command(*call)
    return judged if isinstance(judged, bytes) else int(judged)


def test_a_valid_answer_is_written_back_for_as_long_as_it_may(shelf: Shelf) -> None:
    text = shelf.text()
    assert rehydrate(shelf, text) == 1
    assert shelf.get(1) == text
    assert 50_000 < shelf.left_ms(1) <= 60_000
    short = shelf.text(age_ms=1000, ttl_ms=3000)
    shelf.redis.delete(shelf.names(1).entry(key(1)))
    assert rehydrate(shelf, short) == 1
    assert 0 < shelf.left_ms(1) <= 2000


@pytest.mark.parametrize("tag", ["doc:1", "all", f"key:{key(1)}", "profile:response"])
def test_an_invalidated_answer_is_not_written_back(shelf: Shelf, tag: str) -> None:
    text = shelf.text("doc:1")
    shelf.invalidate(1, tag)
    assert (rehydrate(shelf, text), shelf.get(1)) == (0, None)


def test_an_answer_whose_markers_may_have_been_pruned_is_not_written_back(shelf: Shelf) -> None:
    shelf.redis.hset(shelf.names(1).tags, "#fence", "1")
    assert (rehydrate(shelf, shelf.text()), shelf.get(1)) == (0, None)
    assert rehydrate(shelf, shelf.text(), fence="1") == 1


def test_an_answer_of_another_life_of_the_log_is_not_written_back(shelf: Shelf) -> None:
    assert (rehydrate(shelf, shelf.text(epoch="9999999999999-0")), shelf.get(1)) == (0, None)
    shelf.redis.delete(shelf.names(1).tags)
    assert (rehydrate(shelf, shelf.text()), shelf.get(1)) == (0, None)


def test_an_answer_that_is_gone_is_not_written_back(shelf: Shelf) -> None:
    assert (rehydrate(shelf, shelf.text(age_ms=5000, ttl_ms=4000)), shelf.get(1)) == (0, None)


def test_a_newer_answer_is_not_overwritten_and_answers_instead(shelf: Shelf) -> None:
    newer = shelf.put(1, "doc:1")
    older = shelf.text(age_ms=60_000)
    assert (rehydrate(shelf, older), shelf.get(1)) == (newer, newer)
    assert rehydrate(shelf, newer) == 1
    shelf.invalidate(1, "doc:1")
    assert rehydrate(shelf, older) == 0, "what replaced it was invalidated"


def test_labels_the_answer_does_not_carry_count_as_well(shelf: Shelf) -> None:
    text = shelf.text("doc:1")
    assert rehydrate(shelf, text, asked="doc:2") == 1
    shelf.invalidate(1, "doc:2")
    assert rehydrate(shelf, text, asked="doc:2") == 0
    assert rehydrate(shelf, text, asked="doc:1") == 1
    shelf.redis.hdel(shelf.names(1).tags, "doc:2")  # pruned
    shelf.redis.hset(shelf.names(1).tags, "#pruned", "2-0")
    assert rehydrate(shelf, text, asked="doc:2") == 0


@pytest.mark.parametrize("lookup_knows", [True, False])
async def test_an_answer_kept_for_errors_alone_stands_in_from_there(
    database: Database, pond: Pond, lookup_knows: bool
) -> None:
    kept = {"ttl": 0.05, "stale_if_error": 3600.0, "early_refresh": 0.0}
    pond.options |= {"database_url": database.url, "profiles": {"response": kept}, "attempts": 1, "l3_timeout": 5.0}
    ((key_, text),) = (await forgotten_by_redis(pond, Q)).items()
    await pond.past(unpack(key_, text).expires_ms)
    outage = Outage(pond)
    outage.begin()
    async with pond.working("lookup", l3=lookup_knows), pond.working("llm", **FAST), pond.client() as client:
        reply = await client.ask(Q)
        await pond.settled()
    assert (reply.stale, reply.degraded, pond.calls()) == (True, True, 2)
