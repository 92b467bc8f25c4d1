"""Publishing: the requests of one turn of the event loop go out together, refused at once when there is no room."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis.exceptions import RedisError

from shared.errors import InvalidRequest, MillpondError, Overloaded, Unavailable
from shared.keys import PartitionKeys, partition_of
from shared.link import LINK_ERRORS, Command, Link
from shared.messages import Rules, understand
from shared.scripts import SCRIPTS

_AT_ONCE = 500
_RETRY_AFTER = 1.0
_PAUSE = (0.02, 1.0)


@dataclass(slots=True)
class Outgoing:
    """A request to publish. Times in milliseconds of the server's clock; `cache` empty when it has no directives."""

    request_id: str
    client: str
    deadline_ms: int
    body: bytes
    cache: bytes
    future: asyncio.Future[Any]
    #: whether who asks computes a miss itself
    lead: bool = False
    #: when it is published again, if whoever computes it has died
    knock: asyncio.TimerHandle | None = None
    #: sent before, and perhaps accepted (on a connection that was cut, say)
    repeated: bool = False
    #: answered otherwise meanwhile: not to be published any more
    withdrawn: bool = False
    #: how many invalidations this client had issued when it asked
    clock: int = 0


class Publisher:
    """Publishes until it is known to be accepted or refused; twice is harmless, because replies are matched by id."""

    def __init__(self, link: Link, partitions: int, rules: Rules, limit: int) -> None:
        self._link = link
        self._rules = rules
        self._limit = limit
        self.spread(partitions)
        self._queue: list[Outgoing] = []
        self._loop = asyncio.get_running_loop()
        self._flushing: asyncio.Handle | None = None
        self._pause = _PAUSE[0]

    def spread(self, partitions: int) -> None:
        """Publish to so many partitions from now on."""
        self.partitions = partitions
        self._streams = [PartitionKeys(p).requests for p in range(partitions)]

    def publish(self, outgoing: Outgoing) -> None:
        """Queue one request. It goes out with all others of this turn of the loop."""
        self._queue.append(outgoing)
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Stop; what was not published never will be."""
        self._queue.clear()
        if self._flushing is not None:
            self._flushing.cancel()

    def _flush(self) -> None:
        self._flushing = None
        queue, self._queue = self._queue, []
        for partition, part in self._by_partition([o for o in queue if not (o.withdrawn or o.future.done())]):
            for at in range(0, len(part), _AT_ONCE):
                sent = part[at : at + _AT_ONCE]
                self._link.post([self._command(partition, sent)]).add_done_callback(partial(self._published, sent))

    def _published(self, sent: list[Outgoing], reply: asyncio.Future[list[Any]]) -> None:
        try:
            (accepted,) = reply.result()
        except LINK_ERRORS:
            # The command may have run. Published again it is answered again, and the client drops the repeat.
            for outgoing in sent:
                outgoing.repeated = True
            self._again(sent)
            return
        except RedisError as error:
            accepted = error
        self._pause = _PAUSE[0]
        if isinstance(accepted, RedisError):
            _refuse(sent, Unavailable(f"the server refused the request: {accepted}; `millpond doctor` says more"))
        elif accepted < len(sent):
            full = f"{self._limit} requests are waiting already: try again later, or run more lookup workers"
            _refuse([o for o in sent[accepted:] if not o.repeated], Overloaded(full, retry_after=_RETRY_AFTER))
            # Its first try may have been accepted, so it cannot be called refused: it is tried until its deadline.
            self._again([o for o in sent[accepted:] if o.repeated])

    def _again(self, outgoing: list[Outgoing]) -> None:
        if not outgoing:
            return
        self._queue += outgoing
        if self._flushing is None:
            self._flushing = self._loop.call_later(self._pause * random.uniform(0.5, 1.5), self._flush)
        self._pause = min(self._pause * 2, _PAUSE[1])

    def _by_partition(self, waiting: list[Outgoing]) -> list[tuple[int, list[Outgoing]]]:
        if self.partitions == 1:
            return [(0, waiting)] if waiting else []
        parts: dict[int, list[Outgoing]] = {}
        for outgoing in waiting:
            try:
                key = understand(outgoing.body, outgoing.cache, self._rules).key
                partition = partition_of(key, self.partitions)
            except InvalidRequest:
                partition = 0  # the workers may know better, a profile of theirs perhaps; else they say what is wrong
            parts.setdefault(partition, []).append(outgoing)
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
