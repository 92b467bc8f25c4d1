"""What Millpond is measured against: a plain `GET`, and streams that echo without any cache logic."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis

from producers.bench.measure import Operation, rate
from shared.errors import MillpondError
from shared.link import Link
from shared.scripts import SCRIPTS

ECHO_REQUESTS = "bench:echo:requests"
ECHO_GROUP = "echo"
_READ_AT_ONCE = 1000
_PUBLISH_AT_ONCE = 500
_TRIAL = 0.4


@contextlib.asynccontextmanager
async def fastest_get(url: str, keys: list[str], concurrency: int) -> AsyncIterator[tuple[str, Operation]]:
    """Yield redis-py's asyncio `GET` with whichever connection pool is the fastest here, and that pool's name."""
    pools: dict[str, Callable[[], ConnectionPool]] = {
        f"ConnectionPool({concurrency})": lambda: ConnectionPool.from_url(url, max_connections=concurrency),
        "BlockingConnectionPool(4)": lambda: BlockingConnectionPool.from_url(url, max_connections=4, timeout=None),
        "BlockingConnectionPool(16)": lambda: BlockingConnectionPool.from_url(url, max_connections=16, timeout=None),
    }
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, tuple[float, Operation]] = {}
        for name, make in pools.items():
            connection = Redis.from_pool(make())
            stack.push_async_callback(connection.aclose)
            get = _get(connection, keys)
            found[name] = (await rate(get, concurrency, _TRIAL), get)
        best = max(found, key=lambda name: found[name][0])
        yield best, found[best][1]


@contextlib.asynccontextmanager
async def single_get(url: str, keys: list[str]) -> AsyncIterator[Operation]:
    """Yield redis-py's asyncio `GET` as it comes, for one call at a time."""
    connection = Redis.from_url(url)
    try:
        yield _get(connection, keys)
    finally:
        await connection.aclose()


def _get(connection: Redis, keys: list[str]) -> Operation:
    async def get(number: int) -> None:
        if await connection.get(keys[number % len(keys)]) is None:
            raise MillpondError("a cached entry is gone from Redis; this is a bug, please report it")

    return get


class EchoClient:
    """A client of the echo: publishes the requests of one loop turn in one pipeline, reads one reply stream.

    `scripted` publishes a turn's requests by the script that Millpond uses, else by an XADD each.
    """

    def __init__(self, url: str, name: str, *, scripted: bool) -> None:
        self._link = Link(url, name="echo-client")
        self._reading = Link(url, name="echo-client-read")
        self._replies = f"bench:echo:replies:{name}"
        self._name = name
        self._scripted = scripted
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._queue: list[tuple[bytes, bytes]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishing: asyncio.Task[None] | None = None
        self._count = 0

    async def __aenter__(self) -> EchoClient:
        await self._link.call(("XADD", self._replies, "*", "", ""))
        self._tasks.add(asyncio.create_task(self._read()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reading.close()
        await self._link.close()

    async def ask(self, body: bytes) -> bytes:
        """Send a request; return what came back."""
        self._count += 1
        request_id = b"%x" % self._count
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        self._queue.append((request_id, body))
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._publish())
            self._tasks.add(self._publishing)
            self._publishing.add_done_callback(self._tasks.discard)
        return await future

    async def _publish(self) -> None:
        try:
            while self._queue:
                taken, self._queue = self._queue[:_PUBLISH_AT_ONCE], self._queue[_PUBLISH_AT_ONCE:]
                if self._scripted:
                    args: list[Any] = [1_000_000]
                    for request_id, body in taken:
                        args += (request_id, self._name, 0, body, b"")
                    await self._link.send([SCRIPTS["publish"].call([ECHO_REQUESTS], args)])
                else:
                    await self._link.send(
                        [("XADD", ECHO_REQUESTS, "*", "id", i, "reply", self._name, "body", body) for i, body in taken]
                    )
        finally:
            self._publishing = None

    async def _read(self) -> None:
        last = b"0-0"
        while True:
            _, read = await self._reading.send(
                [
                    ("XTRIM", self._replies, "MINID", last),
                    ("XREAD", "COUNT", _READ_AT_ONCE, "BLOCK", 1000, "STREAMS", self._replies, last),
                ]
            )
            for entry_id, fields in read[0][1] if read else ():
                last = entry_id
                for request_id, payload in zip(fields[::2], fields[1::2], strict=True):
                    if future := self._waiting.pop(request_id, None):
                        future.set_result(payload)


@contextlib.asynccontextmanager
async def single_echo(url: str, bodies: list[bytes]) -> AsyncIterator[Operation]:
    """Yield the echo for one call at a time. The worker must run."""
    async with EchoClient(url, "single", scripted=False) as client:
        yield _echo(client.ask, bodies)


@contextlib.asynccontextmanager
async def fastest_echo(url: str, bodies: list[bytes], concurrency: int) -> AsyncIterator[tuple[str, Operation]]:
    """Yield the echo with whichever way to publish is the faster here, and that way's name. The worker must run."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, tuple[float, Operation]] = {}
        for name, scripted in (("an XADD each", False), ("one script", True)):
            client = await stack.enter_async_context(EchoClient(url, name.split()[0], scripted=scripted))
            echo = _echo(client.ask, bodies)
            found[name] = (await rate(echo, concurrency, _TRIAL), echo)
        best = max(found, key=lambda name: found[name][0])
        yield best, found[best][1]


def _echo(ask: Callable[[bytes], Awaitable[bytes]], bodies: list[bytes]) -> Operation:
    async def echo(number: int) -> None:
        await ask(bodies[number % len(bodies)])

    return echo
