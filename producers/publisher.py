"""Publishing: the requests of one turn of the event loop go out together, refused at once when there is no room."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from shared.errors import InvalidRequest, MillpondError, Overloaded, Unavailable
from shared.keys import PartitionKeys, partition_of
from shared.link import LINK_ERRORS, Command, Link
from shared.messages import Rules, understand
from shared.scripts import SCRIPTS

_AT_ONCE = 500
_RETRY_AFTER = 1.0


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request to publish. Times in milliseconds of the server's clock; `cache` empty when it has no directives."""

    request_id: str
    client: str
    deadline_ms: int
    body: bytes
    cache: bytes
    future: asyncio.Future[Any]


class Publisher:
    """Publishes until it is known to be accepted or refused; twice is harmless, because replies are matched by id."""

    def __init__(self, link: Link, partitions: int, rules: Rules, limit: int) -> None:
        self.partitions = partitions
        self._link = link
        self._rules = rules
        self._limit = limit
        self._streams = [PartitionKeys(p).requests for p in range(partitions)]
        self._queue: list[Outgoing] = []
        self._task: asyncio.Task[None] | None = None

    def publish(self, outgoing: Outgoing) -> None:
        """Queue one request. It goes out with all others of this turn of the loop."""
        self._queue.append(outgoing)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._pump())

    async def close(self) -> None:
        """Stop; what was not published never will be."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _pump(self) -> None:
        pause = 0.02
        try:
            while self._queue:
                taken, self._queue = self._queue[:_AT_ONCE], self._queue[_AT_ONCE:]
                waiting = [outgoing for outgoing in taken if not outgoing.future.done()]
                try:
                    await self._send(waiting)
                    pause = 0.02
                except LINK_ERRORS:
                    # The command may have run. Published again it is answered again, and the client drops the repeat.
                    self._queue = waiting + self._queue
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                    pause = min(pause * 2, 1.0)
                except RedisError as error:
                    refusal = Unavailable(f"the server refused the request: {error}; `millpond doctor` says more")
                    _refuse(waiting, refusal)
        finally:
            self._task = None

    async def _send(self, waiting: list[Outgoing]) -> None:
        parts = self._by_partition(waiting)
        accepted = await self._link.send([self._command(p, part) for p, part in parts])
        for (_, part), count in zip(parts, accepted, strict=True):
            if count < len(part):
                full = f"{self._limit} requests are waiting already: try again later, or run more lookup workers"
                _refuse(part[count:], Overloaded(full, retry_after=_RETRY_AFTER))

    def _by_partition(self, waiting: list[Outgoing]) -> list[tuple[int, list[Outgoing]]]:
        if self.partitions == 1:
            return [(0, waiting)] if waiting else []
        parts: dict[int, list[Outgoing]] = {}
        for outgoing in waiting:
            try:
                key = understand(outgoing.body, outgoing.cache, self._rules).key
            except InvalidRequest as error:
                _refuse([outgoing], error)
            else:
                parts.setdefault(partition_of(key, self.partitions), []).append(outgoing)
        return list(parts.items())

    def _command(self, partition: int, part: list[Outgoing]) -> Command:
        args: list[Any] = [self._limit]
        for outgoing in part:
            args += (outgoing.request_id, outgoing.client, outgoing.deadline_ms, outgoing.body, outgoing.cache)
        return SCRIPTS["publish"].call([self._streams[partition]], args)


def _refuse(refused: list[Outgoing], error: MillpondError) -> None:
    for outgoing in refused:
        if not outgoing.future.done():
            outgoing.future.set_exception(type(error)(error.message, **_details(error)))


def _details(error: MillpondError) -> dict[str, Any]:
    return {name: getattr(error, name) for name in error.details}
