"""Dives: looks into the slow tiers, on the side, so that the batches behind do not wait for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any

log = logging.getLogger("millpond.worker")


class Dives:
    """Tasks that have messages in hand, at most `most` at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()
        self._messages: set[bytes] = set()

    def __contains__(self, message_id: bytes) -> bool:
        return message_id in self._messages

    async def begin(self, messages: Iterable[bytes], dive: Coroutine[Any, Any, None]) -> None:
        """Begin a dive with these messages in hand, once there is room for it."""
        ids = frozenset(messages)
        self._messages |= ids
        while len(self._tasks) >= self._most:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(dive)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, ids))

    async def end(self) -> None:
        """Wait until all have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, ids: frozenset[bytes], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._messages -= ids
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its messages stay pending: they are taken up again after the lease.
            log.warning("a look into the slow tiers failed (%r)", error)
