"""The reply channel: one stream and one reader per client, whatever the number of requests waiting."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from shared import keys
from shared.link import LINK_ERRORS, Command, Link

log = logging.getLogger("millpond.client")

_BLOCK_MS = 1000
_COUNT = 1000
#: Seconds between renewals of the channel's life, and entries read before they are trimmed in between.
_CARE = 1.0
_TRIM_AFTER = 256


class ReplyChannel:
    """Reads `mp:reply:C` and hands every (request id, payload) to `deliver`.

    It keeps its place across reconnections. When the channel itself is gone (the server was flushed, or this process
    slept past its TTL) it is made anew and `renewed` is called: what is still waiting must be asked again.
    """

    def __init__(
        self,
        url: str,
        client: str,
        *,
        ttl: float,
        deliver: Callable[[str, bytes], None],
        renewed: Callable[[], None],
    ) -> None:
        self._name = keys.reply(client)
        self._ttl_ms = int(ttl * 1000)
        self._deliver = deliver
        self._renewed = renewed
        self._link = Link(url, name="millpond-client-read")
        self._loop = asyncio.get_running_loop()
        self._last = b"0-0"
        self._untrimmed = 0
        self._next_care = 0.0
        self._forgotten = False
        #: what to add to this process' monotonic clock for the server's, in seconds: deadlines on the wire are told in
        #: the server's, and no two clocks keep together for ever
        self.clock_offset = 0.0
        self._task: asyncio.Task[None] | None = None
        self._heard = self._loop.time()
        self._failing: float | None = None

    def silence(self) -> float:
        """Return for how many seconds the server has not answered, beyond what a blocking read takes."""
        now = self._loop.time()
        return now - self._failing if self._failing is not None else max(0.0, now - self._heard - _BLOCK_MS / 1000)

    async def open(self) -> None:
        """Create the channel and begin to read; raises one of `LINK_ERRORS`."""
        await self._create()
        self._task = asyncio.create_task(self._read_forever())

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._link.close()

    async def _create(self) -> None:
        (added,) = await self._with_clock([("XADD", self._name, "*", "", "")])
        self._last = added

    async def _with_clock(self, commands: list[Command]) -> list[Any]:
        """Run commands, renew the channel's life and learn the server's clock, in one round trip."""
        before = time.monotonic()
        *results, alive, told = await self._link.send([*commands, ("PEXPIRE", self._name, self._ttl_ms), ("TIME",)])
        self.clock_offset = int(told[0]) + int(told[1]) / 1e6 - (before + time.monotonic()) / 2
        if not alive:
            self._forgotten = True
        return results

    async def _read_forever(self) -> None:
        pause = 0.02
        while True:
            try:
                await self._read_once()
                pause, self._heard, self._failing = 0.02, self._loop.time(), None
            except (*LINK_ERRORS, RedisError) as error:
                if isinstance(error, LINK_ERRORS) and self._failing is None:
                    self._failing = self._loop.time()
                log.debug("reply channel: %s; trying again", error)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(pause * 2, 1.0)

    async def _read_once(self) -> None:
        if self._forgotten:  # until it is known to be made anew: a cut may hide that it was
            await self._create()
            self._forgotten = False
            self._renewed()
        now = self._loop.time()
        if self._untrimmed >= _TRIM_AFTER or now >= self._next_care:
            await self._with_clock([("XTRIM", self._name, "MINID", self._last)])
            self._untrimmed, self._next_care = 0, now + _CARE
            if self._forgotten:
                return
        read = await self._link.call(("XREAD", "COUNT", _COUNT, "BLOCK", _BLOCK_MS, "STREAMS", self._name, self._last))
        if read:
            self._take(read[0][1])

    def _take(self, entries: list[Any]) -> None:
        deliver = self._deliver
        self._untrimmed += len(entries)
        for entry_id, fields in entries:
            self._last = entry_id
            for ids, payload in zip(fields[::2], fields[1::2], strict=True):
                for request_id in ids.decode(errors="replace").split(" "):
                    deliver(request_id, payload)

    async def delete(self, link: Link) -> None:
        """Delete the channel through another link; a dead server is no obstacle to leaving."""
        with contextlib.suppress(*LINK_ERRORS):
            await link.call(("DEL", self._name))
