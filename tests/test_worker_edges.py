"""What a worker meets at the edges of what it expects: nobody else is held up, nothing is paid for twice."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from producers.reply import Reply
from shared import keys
from shared.errors import ConfigError, DeadlineExceeded
from shared.keys import PartitionKeys
from shared.messages import SCHEMA
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, outcomes, until
from workers import joining, llm, lookup

pond = faults_support.pond
own_pond = faults_support.own_pond

PROMPT = "What is a headrace?"
ONLY = PartitionKeys(0)
FAST: dict[str, Any] = {"simulated_first_token": 0.0}
LAST_ID = "18446744073709551615-18446744073709551615"


def left_by_the_dead(pond: Pond, stream: str, group: str, *, deliveries: int = 1, idle_ms: int = 60_000) -> None:
    """Let everything new in a stream have been read by a worker that was then never heard of again."""
    with contextlib.suppress(ResponseError):
        pond.redis.xgroup_create(stream, group, "0", mkstream=True)
    ((_, messages),) = pond.redis.xreadgroup(group, "dead", {stream: ">"})
    ids = [message_id for message_id, _ in messages]
    pond.redis.xclaim(stream, group, "dead", 0, ids, idle=idle_ms, retrycount=deliveries, justid=True)


def aboard(pond: Pond) -> int:
    """Return how many requests are aboard flights."""
    return sum(int(pond.redis.llen(name)) for name in pond.found("{mp:*}:waiters:*"))


# one question with very many tags


async def test_a_question_asked_with_thousands_of_tags_is_answered_once_to_everyone(pond: Pond) -> None:
    async with pond.working("lookup", "llm", simulated_first_token=1.0), pond.client() as client:
        asked = [asyncio.create_task(client.ask(PROMPT, tags=_tags(n))) for n in range(300)]
        await until(lambda: aboard(pond) == 300, "all are aboard")
        await client.invalidate(tags=["unrelated"])
        found = await answers(asked, 10)
        await pond.settled()
        assert (await client.ask(PROMPT)).tier == "llm"
    assert {reply.detail for reply in found} == {"many-tags"}
    assert pond.calls() == 2
    assert pond.length("dead") == 0


async def test_a_flight_with_more_tags_than_it_remembers_is_overtaken_by_any_of_them(pond: Pond) -> None:
    async with pond.working("lookup", "llm", simulated_first_token=0.8), pond.client() as client:
        asked = [asyncio.create_task(client.ask(PROMPT, tags=_tags(n))) for n in range(30)]
        await until(lambda: aboard(pond) == 30, "all are aboard")
        await client.invalidate(tags=_tags(29)[:1])
        late = await client.ask(PROMPT)
        assert len({reply.key for reply in await answers(asked)}) == 1
    assert not late.collapsed
    assert pond.calls() == 2


async def test_an_entry_with_thousands_of_tags_is_served_after_any_invalidation(pond: Pond) -> None:
    async with pond.working("llm", **FAST), pond.client() as client:
        async with pond.working("lookup"):
            await client.ask(PROMPT)
            await pond.settled()
        _tag(pond, [tag for n in range(300) for tag in _tags(n)])
        await client.invalidate(tags=["unrelated"])
        async with pond.working("lookup"):
            found = await answers([client.ask(PROMPT, timeout=5), client.ask("another", timeout=5)])
            assert [reply.tier for reply in found] == ["l2", "llm"]
            await client.invalidate(tags=["t299-31"])
            assert (await client.ask(PROMPT)).tier == "llm"
            await pond.settled()


def _tags(n: int) -> list[str]:
    return [f"t{n}-{m}" for m in range(32)]


def _tag(pond: Pond, tags: list[str]) -> None:
    """Add tags to the stored entry."""
    name = ONLY.entry(pond.key(PROMPT))
    first, rest = pond.redis.get(name).split(b"\n", 1)
    *known, count = first.split(b" ")
    first = b" ".join([*known, b"%d" % (int(count) + len(tags))])
    pond.redis.set(name, b"\n".join([first, *(tag.encode() for tag in tags), rest]), keepttl=True)


# leases


async def test_a_worker_without_a_free_slot_still_takes_over_what_the_dead_left(pond: Pond) -> None:
    pond.options |= {"concurrency": 1, "llm_lease": 0.6, "simulated_first_token": 0.06}
    async with pond.working("lookup"), pond.client() as client:
        victim = asyncio.create_task(client.ask("victim"))
        await until(lambda: pond.length("fills") == 1, "its flight has begun")
        left_by_the_dead(pond, ONLY.fills, "llm", idle_ms=0)
        backlog = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(40)]
        await until(lambda: pond.length("fills") == 41, "a long queue of new ones")
        async with pond.working("llm"):
            await answers([victim])
            still_queued = sum(not task.done() for task in backlog)
            await answers(backlog)
            await pond.settled()
    assert still_queued > 10
    assert pond.calls() == 41


@contextlib.asynccontextmanager
async def _busy_server(pond: Pond) -> AsyncIterator[None]:
    """The server answers -BUSY: somebody's script does not end."""
    pond.redis.config_set("busy-reply-threshold", 50)
    with pond.redis.client() as connection:
        endless = asyncio.create_task(asyncio.to_thread(connection.execute_command, "EVAL", "while true do end", 0))
        try:
            yield
        finally:
            await until(lambda: _killed(pond), "the script is killed")
            with pytest.raises(ResponseError, match="killed"):
                await endless


def _killed(pond: Pond) -> bool:
    with contextlib.suppress(ResponseError, RedisConnectionError):
        pond.redis.script_kill()
        return True
    return False


@contextlib.asynccontextmanager
async def _misshapen_flight(pond: Pond) -> AsyncIterator[None]:
    """The renewal itself is refused: somebody overwrote the flight."""
    flight = ONLY.flight(pond.key(PROMPT))
    pond.redis.rename(flight, "aside")
    pond.redis.set(flight, "no hash", ex=60)
    try:
        yield
    finally:
        pond.redis.rename("aside", flight)


@pytest.mark.parametrize("trouble", [_busy_server, _misshapen_flight])
async def test_a_renewal_that_is_refused_is_not_the_last(
    own_pond: Pond, monkeypatch: pytest.MonkeyPatch, trouble: Callable[[Pond], Any]
) -> None:
    refused = _refusals(monkeypatch)
    own_pond.options |= {"llm_lease": 0.8, "simulated_first_token": 2.0, "concurrency": 1}
    async with own_pond.working("lookup", "llm", "llm"), own_pond.client() as client:
        asked = asyncio.create_task(client.ask(PROMPT))
        await until(lambda: own_pond.calls() == 1, "a call that lasts longer than its lease is in progress")
        async with trouble(own_pond):
            await until(lambda: refused, "a renewal was refused")
        await answers([asked])
        await own_pond.settled()
    assert own_pond.calls() == 1, "the other worker took over what was alive"


def _refusals(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Return a list to which every renewal that fails is added as it happens."""
    renew, refused = llm.LLMConsumer._renew, []

    async def watched(self: llm.LLMConsumer, held: Any) -> None:
        try:
            await renew(self, held)
        except Exception as error:
            refused.append(error)
            raise

    monkeypatch.setattr(llm.LLMConsumer, "_renew", watched)
    return refused


async def test_a_call_outlives_the_deadline_of_who_asked_first_and_is_joined_not_repeated(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    grace = 1.5
    monkeypatch.setattr(joining, "_GRACE_MS", int(grace * 1000))
    pond.options |= {"llm_lease": 60.0, "simulated_first_token": 2.5}
    async with pond.working("lookup", "llm"), pond.client() as client:
        began = time.time()
        (hasty,) = await outcomes([client.ask(PROMPT, timeout=0.3)])
        assert isinstance(hasty, DeadlineExceeded)
        await until(lambda: time.time() > began + 0.3 + grace + 0.1, "nobody has a deadline left that it was kept for")
        patient = await client.ask(PROMPT)
        await pond.settled()
    assert patient.collapsed
    assert pond.calls() == 1


async def test_a_lookup_worker_frozen_after_it_took_a_message_over_says_nothing_when_it_wakes(pond: Pond) -> None:
    raw = Raw(pond)
    async with pond.working("lookup", "llm", **FAST):
        raw.publish("r0", PROMPT)
        await raw.answered("r0")
        await pond.settled()
    raw.publish("r1", PROMPT)
    left_by_the_dead(pond, ONLY.requests, "lookup")
    async with pond.process("lookup", fault="stop@lookup_after_redeliver") as zombie:
        await asyncio.to_thread(zombie.await_stopped)
        async with pond.working("lookup"):
            await raw.answered("r1")
            await pond.settled()
        before = pond.keyspace()
        probe = Raw(pond, "probe")
        probe.publish("p", PROMPT, cache=b'{"mode":"only-if-cached"}')
        zombie.sigcont()
        await probe.answered("p")
        await pond.settled()
        pond.redis.delete(probe.channel)
        assert pond.keyspace() == before
    assert len(raw.replies("r1")) == 1


async def test_one_suspect_in_a_long_call_does_not_hold_up_the_next(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        asked = [asyncio.create_task(client.ask(f"{PROMPT} ({n})")) for n in range(2)]
        await until(lambda: pond.length("fills") == 2, "both flights have begun")
        left_by_the_dead(pond, ONLY.fills, "llm", deliveries=2)
        async with pond.working("llm", simulated_first_token=60.0, drain_timeout=0.0):
            await until(lambda: pond.calls() == 2, "both are computed at once", timeout=8)
        async with pond.working("llm", **FAST):
            await answers(asked)
            await pond.settled()


# what cannot be read, told or buried as usual


@pytest.mark.parametrize("deliveries", [1, 5])
async def test_a_request_of_thousands_of_fields_is_buried_and_holds_up_nobody(pond: Pond, deliveries: int) -> None:
    raw = Raw(pond)
    pond.redis.xadd(ONLY.requests, {f"f{n}": "v" for n in range(4500)})
    left_by_the_dead(pond, ONLY.requests, "lookup", deliveries=deliveries)
    raw.publish("innocent", PROMPT)
    left_by_the_dead(pond, ONLY.requests, "lookup")
    async with pond.working("lookup", "llm", **FAST):
        await raw.answered("innocent")
        await until(lambda: pond.length("dead") == 1, "it is buried", timeout=5)
        await pond.settled()


async def test_an_outcome_of_another_version_is_told_as_an_error_and_holds_up_nobody(pond: Pond) -> None:
    raw = Raw(pond)
    async with pond.working("lookup"):
        raw.publish("odd", "odd")
        await until(lambda: pond.length("fills") == 1, "one flight has begun")
        left_by_the_dead(pond, ONLY.fills, "llm", deliveries=5)
        raw.publish("innocent", PROMPT)
        await until(lambda: pond.length("fills") == 2, "another has begun")
        left_by_the_dead(pond, ONLY.fills, "llm")
        flight = ONLY.flight(pond.key("odd"))
        outcome = ONLY.outcome(pond.key("odd"), pond.redis.hget(flight, "token").decode())
        pond.redis.set(outcome, b'stored\nmp2 0-0 1 2 0 0 0\n{"model":"m","enc":"zstd9"}\n?', ex=120)
        pond.redis.delete(flight)  # it had landed
        async with pond.working("llm", **FAST):
            await raw.answered("innocent")
            await raw.answered("odd")
            await until(lambda: pond.length("dead") == 1 and pond.length("fills") == 0, "it is buried", timeout=5)


async def test_a_reply_channel_that_takes_no_more_holds_up_nobody(pond: Pond) -> None:
    full, raw = Raw(pond, "full"), Raw(pond)
    pond.redis.xadd(full.channel, {"": ""}, id=LAST_ID)
    async with pond.working("lookup", "llm"):
        for missed_then_hit in ("r1", "r2"):
            full.publish(missed_then_hit, PROMPT)
            raw.publish(missed_then_hit, PROMPT)
            await raw.answered(missed_then_hit)
            await until(pond.is_settled, "nothing is left to do", timeout=5)
    assert pond.calls() == 1
    assert pond.length("dead") == 0


async def test_one_request_whose_id_is_no_text_does_not_hold_up_its_batch(pond: Pond) -> None:
    pond.options |= {"lookup_lease": 20.0}  # nobody is answered by a second try
    raw = Raw(pond)
    raw.publish("bad", "bypassed", id=b"\xff", reply="nobody", cache=b'{"mode":"bypass"}')
    raw.publish("innocent", PROMPT)
    async with pond.working("lookup", "llm", **FAST):
        await raw.answered("innocent")
        await until(lambda: pond.length("dead") == 1, "the other is buried", timeout=5)
        await pond.settled()
    assert pond.calls("bypassed") == 0


@pytest.mark.parametrize(
    "entry",
    [{"tags": "doc:42"}, {"by": "somebody"}, {"what": "ever"}, {"by": "x", "tags": b"\xff"}],
    ids=["by-nobody", "no-tags", "neither", "no-text"],
)
async def test_a_log_entry_written_by_other_hands_holds_up_nobody(pond: Pond, entry: dict[Any, Any]) -> None:
    pond.options |= {"lookup_lease": 20.0}  # nobody is answered by a second try
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await client.ask(PROMPT, tags=["doc:1"])
        pond.redis.xadd(ONLY.invalidations, entry)
        found = await answers([client.ask(PROMPT, timeout=5), client.ask("another", timeout=5)])
        assert [reply.tier for reply in found] in (["l1", "llm"], ["l2", "llm"])
        await client.invalidate(tags=["doc:1"])
        assert (await client.ask(PROMPT, tags=["doc:1"])).tier == "llm"


# births and deaths


@pytest.mark.parametrize("run", [lookup.run, llm.run], ids=["lookup", "llm"])
async def test_a_worker_whose_deployment_was_born_anew_otherwise_ends_and_says_so(
    pond: Pond, run: Callable[..., Any]
) -> None:
    begun = asyncio.Event()
    working = asyncio.create_task(run(pond.settings, asyncio.Event(), lambda _: begun.set()))
    await begun.wait()
    with pond.redis.pipeline(transaction=True) as rebirth:
        rebirth.flushall()
        rebirth.hset(keys.DEPLOYMENT, mapping={"partitions": 4, "schema": SCHEMA})
        rebirth.execute()
    with pytest.raises(ConfigError, match="MILLPOND_PARTITIONS=4"):
        await asyncio.wait_for(working, 10)
    assert pond.found("mp:worker:*") == []


async def test_a_worker_that_no_longer_belongs_hands_back_what_it_has_in_hand(pond: Pond) -> None:
    pond.options |= {"llm_lease": 20.0}
    leaving = pond.with_(simulated_first_token=60.0, drain_timeout=0.0)
    async with pond.client(partitions=None) as client:
        async with pond.working("lookup"):
            working = asyncio.create_task(llm.run(leaving, asyncio.Event(), lambda _: None))
            asked = asyncio.create_task(client.ask(PROMPT))
            await until(lambda: pond.calls() == 1, "its call is in progress")
        pond.redis.hset(keys.DEPLOYMENT, "partitions", 4)
        with pytest.raises(ConfigError):
            await asyncio.wait_for(working, 10)
        async with pond.working("lookup", "llm", partitions=4, **FAST):
            (told,) = await answers([asked], 10)
            await pond.settled()
    assert isinstance(told, Reply)


@pytest.mark.parametrize(("kind", "stream"), [("lookup", ONLY.requests), ("llm", ONLY.fills)])
async def test_a_worker_that_cannot_begin_ends_at_once_when_asked_to(pond: Pond, kind: str, stream: str) -> None:
    pond.redis.set(stream, "no stream")
    before = _connections(pond, kind)
    async with pond.process(kind, ready=False) as process:
        await until(lambda: _connections(pond, kind) - before, "it tries to begin")
        process.send(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 8) == 0
    assert not any(line.get("event") == "ready" for line in process.lines)
    pond.redis.delete(stream)


def _connections(pond: Pond, kind: str) -> set[str]:
    return {found["id"] for found in pond.redis.client_list() if found["name"] == f"millpond-{kind}"}
