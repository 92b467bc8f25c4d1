"""What the fault tests share: a deployment seen from outside, and a client that sees every reply.

Oracles are what clients get and what the provider itself counted; waiting is always for a condition.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis

from producers.client import Client
from producers.reply import Reply
from shared import keys
from shared.embedded import EmbeddedRedis
from shared.envelope import opened
from shared.keys import PartitionKeys, partition_of
from shared.messages import Rules, understand
from shared.providers.simulated import calls
from shared.settings import Settings, load
from tests.conftest import Server
from tests.processes import Process, start_worker
from workers.kinds import Kind

_POLL = 0.005
_QUIET = ("flight", "waiters", "outcome")
_WORKER_KEYS = (b"mp:worker:", b"mp:stats", b"mp:deployment", b"mp:limit")

#: Quick leases and a provider that takes 0.2 s: a fault, its lease and its recovery fit into two seconds.
QUICK: dict[str, Any] = {
    "lookup_lease": 1.0,
    "llm_lease": 1.0,
    "timeout": 25.0,
    "drain_timeout": 5.0,
    "simulated_first_token": 0.2,
    "simulated_tokens_per_second": 1e6,
    "simulated_tokens": 20,
}


async def until(condition: Callable[[], object], what: str, timeout: float = 15.0) -> None:
    """Wait until `condition` holds; fail with `what` when it does not in time (seconds)."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout} s still not: {what}"
        await asyncio.sleep(_POLL)


async def throughout(seconds: float, condition: Callable[[], object], what: str) -> None:
    """Look again and again for so long (seconds); fail with `what` when `condition` does not hold at one look."""
    deadline, over = time.monotonic() + seconds, False
    while not over:
        over = time.monotonic() >= deadline
        assert condition(), f"not for {seconds} s: {what}"
        await asyncio.sleep(_POLL)


async def outcomes(asked: Sequence[Awaitable[Reply]], timeout: float = 30.0) -> list[Reply | BaseException]:
    """Return what each ask came to: its reply, or the error it raised."""
    async with asyncio.timeout(timeout):
        return await asyncio.gather(*asked, return_exceptions=True)


async def answers(asked: Sequence[Awaitable[Reply]], timeout: float = 30.0) -> list[Reply]:
    """Return everyone's reply; fail if anyone got an error."""
    found = await outcomes(asked, timeout)
    errors = [one for one in found if not isinstance(one, Reply)]
    assert errors == [], f"{len(errors)} of {len(found)} got an error"
    return [one for one in found if isinstance(one, Reply)]


@asynccontextmanager
async def running(*workers: tuple[Kind, Settings]) -> AsyncIterator[None]:
    """Run healthy workers in this process, stopped in order at the end."""
    stop = asyncio.Event()
    tasks, ready = [], []
    for kind, settings in workers:
        begun = asyncio.Event()
        ready.append(begun)
        tasks.append(asyncio.ensure_future(kind.run(settings, stop, partial(_begin, begun))))
    try:
        await until(lambda: all(e.is_set() for e in ready) or any(t.done() for t in tasks), "the workers read")
        yield
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await asyncio.gather(*tasks)


def _begin(begun: asyncio.Event, _name: str) -> None:
    begun.set()


class Pond:
    """One deployment under test: its server looked at from outside, its workers, its provider's own journal."""

    def __init__(self, url: str, connection: redis.Redis, options: dict[str, Any]) -> None:
        self.url = url
        self.redis: Any = connection  # redis-py types its sync replies as awaitable, too
        self.options = options
        self.journal: Path = options["simulated_journal"]
        self.partitions: int = options.get("partitions", 1)
        self.settings = self.with_(url)

    def with_(self, url: str | None = None, **changes: Any) -> Settings:
        """Return the deployment's settings, seen through another URL or otherwise changed."""
        return load(redis_url=url or self.url, **(self.options | changes))

    def client(self, url: str | None = None, **changes: Any) -> Client:
        """Return a client that is not connected yet."""
        return Client(settings=self.with_(url, **changes))

    # the oracles

    def calls(self, prompt: str | None = None) -> int:
        """Return how often the provider was called, by its own count."""
        return sum(prompt in (None, call["prompt"]) for call in calls(self.journal))

    def stat(self, name: str) -> int:
        """Return one of the deployment's counters."""
        return int(self.redis.execute_command("HGET", keys.STATS, name) or 0)

    def now_ms(self) -> int:
        """Return the server's time, by which answers age."""
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def past(self, moment_ms: int) -> None:
        """Wait until a moment of the server's time is over."""
        await until(lambda: self.now_ms() > moment_ms, "that moment is over")

    async def aged(self, seconds: float | None = None) -> None:
        """Wait until each answer in L2 is older than so many seconds; without them, until none is fresh."""
        names = self.found("{mp:*}:entry:*")
        entries = [opened(text) for text in (self.redis.mget(names) if names else ()) if text]
        assert entries, "nothing is stored"
        spans = [one.ttl_ms if seconds is None else int(seconds * 1000) for one in entries]
        over = max(one.created_ms + span for one, span in zip(entries, spans, strict=True))
        await self.past(over)

    def key(self, prompt: str) -> str:
        """Return the cache key of a plain prompt."""
        return understand(body_of(prompt), None, Rules.of(self.settings)).key

    def names(self, prompt: str) -> PartitionKeys:
        """Return the key names of the partition a plain prompt belongs to."""
        return PartitionKeys(partition_of(self.key(prompt), self.partitions))

    def all_names(self) -> list[PartitionKeys]:
        """Return the key names of every partition."""
        return [PartitionKeys(p) for p in range(self.partitions)]

    def length(self, stream: str) -> int:
        """Return the entries of one kind of stream (`requests`, `fills`, …) in all partitions."""
        return sum(int(self.redis.execute_command("XLEN", getattr(k, stream))) for k in self.all_names())

    def pending(self, stream: str) -> int:
        """Return the messages of one kind of stream that are delivered and not acknowledged."""
        count = 0
        for names in self.all_names():
            for group in self._groups(getattr(names, stream)):
                count += int(group["pending"])
        return count

    def in_hand(self, stream: str, group: str) -> dict[tuple[int, bytes], tuple[str, int]]:
        """Return what a group holds of one kind of stream, by partition and id: who has it, how often delivered."""
        return {
            (partition, one["message_id"]): (one["consumer"].decode(), int(one["times_delivered"]))
            for partition, one in self._pending(stream, group)
        }

    def longest_idle(self, stream: str, group: str) -> float:
        """Return for how long (seconds) nothing was heard of the message in hand that was renewed the least lately."""
        return max(int(one["time_since_delivered"]) for _, one in self._pending(stream, group)) / 1000

    def _pending(self, stream: str, group: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for k in self.all_names():
            if self.redis.exists(name := getattr(k, stream)):
                for one in self.redis.xpending_range(name, group, "-", "+", 10_000):
                    yield k.partition, one

    def consumers(self, stream: str) -> set[str]:
        """Return the names of the consumers in the group of one kind of stream."""
        return {name for names in self.all_names() for name in self._consumers(getattr(names, stream))}

    def _groups(self, stream: str) -> list[dict[str, Any]]:
        if not self.redis.execute_command("EXISTS", stream):
            return []
        return list(self.redis.xinfo_groups(stream))

    def _consumers(self, stream: str) -> dict[str, dict[str, Any]]:
        return {
            about["name"].decode(): about
            for group in self._groups(stream)
            for about in self.redis.xinfo_consumers(stream, group["name"])
        }

    def found(self, pattern: str) -> list[bytes]:
        """Return the names of all keys that match, each once, in order."""
        return sorted(set(self.redis.scan_iter(pattern, count=1000)))

    def is_settled(self) -> bool:
        """Whether nothing is waiting, in hand, in flight or still to be told."""
        if any(self.length(stream) for stream in ("requests", "fills", "refreshes")):
            return False
        return not any(self.found(f"{{mp:*}}:{part}:*") for part in _QUIET)

    async def settled(self) -> None:
        """Wait until everything that was begun is done with."""
        await until(self.is_settled, "every message retired and every flight cleared")

    def keyspace(self) -> dict[bytes, Any]:
        """Return all that lies in Redis, with who has what pending; without heartbeats and counters."""
        found = {key: self._value(key) for key in self.redis.scan_iter(count=1000) if not key.startswith(_WORKER_KEYS)}
        return {key: value for key, value in found.items() if value is not None}

    def _value(self, key: bytes) -> Any:
        kind = self.redis.type(key)
        if kind == b"stream":
            pending = [self.redis.xpending_range(key, g["name"], "-", "+", 1000) for g in self._groups(key.decode())]
            owners = [[(one["message_id"], one["consumer"]) for one in part] for part in pending]
            return self.redis.execute_command("XRANGE", key, "-", "+"), owners
        if kind == b"hash":
            return self.redis.hgetall(key)
        if kind == b"list":
            return self.redis.lrange(key, 0, -1)
        return self.redis.get(key)

    # the workers

    @asynccontextmanager
    async def working(self, *kinds: str, url: str | None = None, **changes: Any) -> AsyncIterator[None]:
        """Run healthy workers in this process, one of each kind, stopped in order at the end."""
        settings = self.with_(url, **changes)
        async with running(*((Kind(kind), settings) for kind in kinds)):
            yield

    @asynccontextmanager
    async def process(
        self, kind: str, *, fault: str | None = None, ready: bool = True, url: str | None = None, **changes: Any
    ) -> AsyncIterator[Process]:
        """Run one worker as a process, that the test may kill, freeze or stop; killed at the end if it still runs."""
        process = start_worker(kind, url or self.url, fault=fault, ready=False, **(self.options | changes))
        try:
            if ready:
                await asyncio.to_thread(process.wait_for, "ready")
            yield process
        finally:
            process.close()


def body_of(prompt: str) -> bytes:
    """Return the body that `Client.ask(prompt)` sends."""
    return orjson.dumps({"messages": [{"role": "user", "content": prompt}]})


class Raw:
    """A client of nothing but XADD and XRANGE. It never trims its channel, so it sees every reply ever sent to it."""

    def __init__(self, pond: Pond, name: str = "raw", ttl_ms: int = 60_000) -> None:
        self.pond = pond
        self.name = name
        self.channel = keys.reply(name)
        pond.redis.execute_command("XADD", self.channel, "*", "", "")
        pond.redis.execute_command("PEXPIRE", self.channel, ttl_ms)

    def publish(
        self, request_id: str, prompt: str, *, partition: int | None = None, timeout: float = 25.0, **fields: Any
    ) -> bytes:
        """XADD one request, to its own partition or another; `fields` replace what it would say, None leaves it out."""
        at = self.pond.names(prompt).partition if partition is None else partition
        request: dict[str, Any] = {
            "id": request_id,
            "reply": self.name,
            "deadline": int((time.time() + timeout) * 1000),
            "body": body_of(prompt),
        } | fields
        said = [part for name, value in request.items() if value is not None for part in (name, value)]
        sent: bytes = self.pond.redis.execute_command("XADD", PartitionKeys(at).requests, "*", *said)
        return sent

    def replies(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """Return the payloads of every reply so far, or of those to one request."""
        found = []
        for _, fields in self.pond.redis.execute_command("XRANGE", self.channel, "-", "+"):
            pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
            for ids, payload in pairs:
                named = ids.decode().split(" ")
                if ids and (request_id is None or request_id in named):
                    found.append(orjson.loads(payload))
        return found

    async def answered(self, request_id: str) -> dict[str, Any]:
        """Wait for the first reply to a request, and return its payload."""
        await until(lambda: self.replies(request_id), f"a reply to {request_id}")
        return self.replies(request_id)[0]


def _pond(url: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pond]:
    options = QUICK | {"simulated_journal": tmp_path / "calls.jsonl"}
    if "partitions" in request.fixturenames:
        options["partitions"] = request.getfixturevalue("partitions")
    for name in ("database", "own_database"):
        if name in request.fixturenames:
            options["database_url"] = request.getfixturevalue(name).url
    with redis.Redis.from_url(url) as connection:
        yield Pond(url, connection, options)


@pytest.fixture
def pond(server: Server, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pond]:
    """A deployment on the shared server."""
    yield from _pond(server.url, request, tmp_path)


@pytest.fixture
def own_pond(own_server: EmbeddedRedis, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pond]:
    """A deployment on a server of its own, which the test may kill and restart."""
    yield from _pond(own_server.url, request, tmp_path)
