"""One Redis connection that pipelines whatever is sent to it while it is busy.

redis-py makes the connection (URLs, TLS, authentication); a `Link` adds what its pipelines cost too much for: many
callers share one write and one read, without an object per command. A cancelled caller leaves the connection in step,
because only the link's own task reads from it. Blocking reads get a link of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import Connection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.scripts import SCRIPTS

Command = tuple[Any, ...]

#: What a caller may see when the connection is lost; the command may or may not have run.
LINK_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)

_WIDEST = 2000
_LOADING = [("SCRIPT", "LOAD", script.source) for script in SCRIPTS.values()]


class Link:
    """A pipelining connection to one Redis server.

    `reply_timeout` (seconds) bounds one round trip; a blocking read must ask for less than that.
    """

    def __init__(self, url: str, *, name: str = "millpond", reply_timeout: float = 15.0) -> None:
        pool: ConnectionPool = ConnectionPool.from_url(url, client_name=name, socket_connect_timeout=5.0)
        self._connection: Connection = pool.make_connection()
        self._reply_timeout = reply_timeout
        self._queue: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]] = []
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    def post(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Queue commands, to run in order and adjacent; the future yields their replies.

        A reply may be a `ResponseError` object: one command's failure does not hide the others' replies. The future
        raises one of `LINK_ERRORS` when the connection was lost, or never came about.
        """
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(RedisConnectionError("this link is closed"))
            return future
        self._queue.append((commands, future))
        if self._pump is None:
            self._pump = asyncio.create_task(self._drain())
        return future

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands in one round trip; raise the first error reply, or one of `LINK_ERRORS`."""
        replies = await self.post(commands)
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    async def call(self, command: Command) -> Any:
        """Run one command and return its reply; errors as `send`."""
        return (await self.send([command]))[0]

    async def close(self) -> None:
        """Close the connection; whoever still waits gets a connection error."""
        self._closed = True
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        self._fail(self._take(), RedisConnectionError("this link is closed"))
        await self._connection.disconnect(nowait=True)

    def _take(self) -> list[tuple[Sequence[Command], asyncio.Future[list[Any]]]]:
        taken, self._queue = self._queue, []
        return taken

    @staticmethod
    def _fail(work: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]], error: BaseException) -> None:
        for _, future in work:
            if not future.done():
                future.set_exception(error)

    async def _drain(self) -> None:
        work: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]] = []
        try:
            while self._queue:
                work = self._take()
                try:
                    async with asyncio.timeout(self._reply_timeout):
                        await self._exchange(work)
                except Exception as error:
                    # Bytes may be on their way: the connection is never reused out of step.
                    await self._connection.disconnect(nowait=True)
                    self._fail(work, error)
        except asyncio.CancelledError:
            self._fail(work, RedisConnectionError("this link is closed"))
            raise
        finally:
            self._pump = None

    async def _exchange(self, work: list[tuple[Sequence[Command], asyncio.Future[list[Any]]]]) -> None:
        if not self._connection.is_connected:
            await self._connection.connect()
            await self._round_trip(_LOADING)
        if len(work) == 1:
            commands, future = work[0]
            replies = await self._round_trip(commands)
            if not future.done():
                future.set_result(replies)
            return
        for at in range(0, len(work), _WIDEST):
            part = work[at : at + _WIDEST]
            replies = await self._round_trip([command for commands, _ in part for command in commands])
            start = 0
            for commands, future in part:
                stop = start + len(commands)
                if not future.done():
                    future.set_result(replies[start:stop])
                start = stop

    async def _round_trip(self, commands: Sequence[Command]) -> list[Any]:
        connection = self._connection
        await connection.send_packed_command([hiredis.pack_command(c) for c in commands], check_health=False)
        replies = []
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except NoScriptError as error:
                # SCRIPT FLUSH: reconnecting loads the scripts again, and the caller tries again as after any cut.
                raise RedisConnectionError("the server lost its scripts") from error
            except ResponseError as error:
                replies.append(error)
        return replies
