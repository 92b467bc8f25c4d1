"""One Redis connection on which everything is pipelined.

redis-py makes the connection (URLs, TLS, authentication, name, database); a `Link` then speaks on its transport
itself, because a redis-py call costs more than the command it sends. Commands go out at once, replies resolve futures
in order, no task and no lock stand between. A cancelled caller leaves the connection in step. Blocking reads get a
link of their own: whatever is posted behind one waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import Connection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.scripts import SCRIPTS

Command = tuple[Any, ...]

#: What a caller may see when the connection is lost; the command may or may not have run.
LINK_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)

_CONNECT_TIMEOUT = 5.0
_LOADING = [("SCRIPT", "LOAD", script.source) for script in SCRIPTS.values()]
#: Error replies that say "not this connection, not now" rather than "not this command".
_PASSING = ("NOSCRIPT", "LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "OOM", "MISCONF", "NOREPLICAS", "BUSY ")


class _Posted:
    """Commands posted together, and as many of their replies as have come."""

    __slots__ = ("commands", "expected", "future", "replies", "since")

    def __init__(self, commands: Sequence[Command], future: asyncio.Future[list[Any]], since: float) -> None:
        self.commands = commands
        self.expected = len(commands)
        self.future = future
        self.replies: list[Any] = []
        self.since = since

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Link(asyncio.Protocol):
    """A pipelining connection to one Redis server.

    `reply_timeout` (seconds) bounds one round trip; a blocking read must ask for less than that.
    """

    def __init__(self, url: str, *, name: str = "millpond", reply_timeout: float = 15.0) -> None:
        self._pool: ConnectionPool = ConnectionPool.from_url(
            url, client_name=name, socket_connect_timeout=_CONNECT_TIMEOUT
        )
        self._reply_timeout = reply_timeout
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader()
        self._sent: deque[_Posted] = deque()
        self._unsent: list[_Posted] = []
        self._connecting: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._closed = False

    def post(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Send commands, to run in order and adjacent; the future yields their replies.

        A reply may be a `ResponseError` object: one command's failure does not hide the others' replies. The future
        raises one of `LINK_ERRORS` when the connection was lost, or never came about.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        posted = _Posted(commands, future, self._loop.time())
        if self._transport is not None:
            self._write(posted)
        elif self._closed:
            posted.fail(RedisConnectionError("this link is closed"))
        else:
            self._unsent.append(posted)
            if self._connecting is None:
                self._connecting = self._loop.create_task(self._connect())
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
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        self._lose(RedisConnectionError("this link is closed"))

    def _write(self, posted: _Posted) -> None:
        assert self._transport is not None  # noqa: S101 (both callers looked)
        try:
            packed = [hiredis.pack_command(command) for command in posted.commands]
        except Exception as error:
            posted.fail(error)
            return
        if not packed:
            posted.future.set_result([])
            return
        self._sent.append(posted)
        self._transport.write(packed[0] if len(packed) == 1 else b"".join(packed))
        if self._watch is None:
            self._watch = self._loop.call_later(self._reply_timeout, self._look_at_watch)

    async def _connect(self) -> None:
        try:
            connection = self._pool.make_connection()
            async with asyncio.timeout(_CONNECT_TIMEOUT + 1):
                await connection.connect()
            # The handshake is over and its replies are read: from here on the transport is ours.
            assert connection._writer is not None  # noqa: S101 (connected)
            self._connection = connection
            self._transport = connection._writer.transport
            self._reader = hiredis.Reader(replyError=_error)
            self._transport.set_protocol(self)
            self._transport.resume_reading()
        except TimeoutError:
            self._lose(RedisTimeoutError(f"no connection within {_CONNECT_TIMEOUT:g} s"))
            return
        except Exception as error:
            self._lose(error)
            return
        finally:
            self._connecting = None
        unsent, self._unsent = self._unsent, []
        loading: asyncio.Future[list[Any]] = self._loop.create_future()
        loading.add_done_callback(_look)
        self._write(_Posted(_LOADING, loading, self._loop.time()))
        for posted in unsent:
            self._write(posted)

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        """Resolve whatever these bytes complete."""
        reader, sent = self._reader, self._sent
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                if isinstance(reply, RedisConnectionError):
                    self._lose(reply)
                    return
                posted = sent[0]
                posted.replies.append(reply)
                if len(posted.replies) == posted.expected:
                    sent.popleft()
                    if not posted.future.done():
                        posted.future.set_result(posted.replies)
        except (hiredis.ProtocolError, IndexError) as error:
            self._lose(RedisConnectionError(f"the server's reply is not understood: {error!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whoever waits; the next post connects again."""
        self._lose(RedisConnectionError(f"the connection to Redis was lost ({exc or 'closed by the server'})"))

    def _lose(self, error: BaseException) -> None:
        connection, transport = self._connection, self._transport
        self._connection = self._transport = None
        if connection is not None and transport is not None:
            transport.abort()
            connection._reader = connection._writer = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        waiting = [*self._sent, *self._unsent]
        self._sent.clear()
        self._unsent.clear()
        for posted in waiting:
            posted.fail(error)

    def _look_at_watch(self) -> None:
        self._watch = None
        if not self._sent:
            return
        left = self._sent[0].since + self._reply_timeout - self._loop.time()
        if left <= 0:
            self._lose(RedisTimeoutError(f"no reply within {self._reply_timeout:g} s"))
        else:
            self._watch = self._loop.call_later(left, self._look_at_watch)


def _error(text: str) -> Exception:
    return RedisConnectionError(text) if text.startswith(_PASSING) else ResponseError(text)


def _look(future: asyncio.Future[Any]) -> None:
    """Retrieve the exception of a future nobody awaits; its cause reaches whoever posted behind it."""
    if not future.cancelled():
        future.exception()
