"""A small proxy between a client and its server that misbehaves on demand.

async with Proxy.to(server.url) as proxy:
    client = Client(url=proxy.url)
    proxy.delay = 0.05                                   # seconds, each way of each chunk
    proxy.cut_before(lambda data: b"EVALSHA" in data)    # the command never reaches the server
    proxy.cut_after(lambda data: b"EVALSHA" in data)     # it runs, and the reply is lost
    await proxy.cut()                                    # every connection, now
    proxy.refuse = True                                  # and no new ones
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType
from urllib.parse import unquote, urlsplit

Predicate = Callable[[bytes], bool]
_CHUNK = 1 << 16


class Proxy:
    """Listens on a TCP port of localhost, forwards to a unix socket or a TCP address.

    `connections` counts those accepted, `refused` those of them ended at once (told to, or nobody listens upstream),
    `cuts` those that a predicate ended.
    """

    def __init__(self, *, path: str | None = None, host: str = "127.0.0.1", port: int = 6379) -> None:
        self._path, self._host, self._port = path, host, port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._before: Predicate | None = None
        self._after: Predicate | None = None
        self._times = 0
        self.delay = 0.0
        self.refuse = False
        self.connections = 0
        self.refused = 0
        self.cuts = 0

    @classmethod
    def to(cls, url: str) -> Proxy:
        """Return a proxy to the server of a `unix://` or `redis://` URL."""
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return cls(path=unquote(parts.path))
        return cls(host=parts.hostname or "127.0.0.1", port=parts.port or 6379)

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None, "use it as `async with`"
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut_before(self, predicate: Predicate, times: int = 1) -> None:
        """Cut the connection instead of forwarding a matching chunk, `times` times."""
        self._before, self._after, self._times = predicate, None, times

    def cut_after(self, predicate: Predicate, times: int = 1) -> None:
        """Forward a matching chunk, wait until the server has answered it, then cut and drop the answer."""
        self._before, self._after, self._times = None, predicate, times

    async def cut(self) -> None:
        """Cut every connection now."""
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        if self.refuse:
            self.refused += 1
            writer.transport.abort()
            return
        try:
            if self._path is not None:
                up_reader, up_writer = await asyncio.open_unix_connection(self._path)
            else:
                up_reader, up_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            self.refused += 1
            writer.transport.abort()
            return
        self._open |= {writer, up_writer}
        dropping = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._upstream(reader, up_writer, writer, dropping))
                group.create_task(self._downstream(up_reader, writer, up_writer, dropping))
        finally:
            self._open -= {writer, up_writer}
            for end in (writer, up_writer):
                end.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _upstream(
        self,
        reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
        dropping: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await asyncio.sleep(self.delay)
                if self._matches(self._before, data):
                    self.cuts += 1
                    writer.transport.abort()
                    break
                if self._matches(self._after, data):
                    self.cuts += 1
                    dropping.set()  # before the command leaves: its answer cannot slip through
                up_writer.write(data)
                await up_writer.drain()
        if not dropping.is_set():
            up_writer.transport.abort()

    async def _downstream(
        self,
        up_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_writer: asyncio.StreamWriter,
        dropping: asyncio.Event,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await up_reader.read(_CHUNK):
                if dropping.is_set():
                    # What came may answer an earlier command. The server runs what it was sent before it sees the end,
                    # but for what waits behind a read that still blocks: that ends with the connection, and never runs.
                    up_writer.write_eof()
                    while await up_reader.read(_CHUNK):
                        pass
                    break
                await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    def _matches(self, predicate: Predicate | None, data: bytes) -> bool:
        if predicate is None or self._times <= 0 or not predicate(data):
            return False
        self._times -= 1
        return True
