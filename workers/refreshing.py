"""Refreshing: answers that have expired softly, or are about to, are computed anew while they are still served."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterable
from typing import Any

from shared.counters import Counters
from shared.entry import Entry
from shared.link import Link
from shared.profiles import Profile
from workers.batch import Ask, Batch
from workers.joining import Joining

#: Seconds for which a key whose refresh was asked for is not asked for again.
_PAUSE = 2.0
_REMEMBERED = 4096
#: -log of the smallest chance XFetch is asked about: how many compute times before its expiry a refresh may begin.
_REACH = 12.0


class Refreshing:
    """Decides for one consumer what is refreshed; the script sees to one refresh per key across all of them."""

    def __init__(self, joining: Joining, link: Link, counters: Counters, profiles: Iterable[Profile]) -> None:
        self._joining = joining
        self._link = link
        self._counters = counters
        self._asked: dict[str, float] = {}
        self._reach = _REACH * max(profile.early_refresh for profile in profiles)

    def consider(self, batch: Batch, ask: Ask, entry: Entry) -> None:
        """Have an entry that was served refreshed if it has expired softly or, by chance, is about to.

        The nearer the expiry and the longer the computation, the likelier. XFetch: Vattani, Chierichetti, Lowenstein,
        "Optimal Probabilistic Cache Stampede Prevention", VLDB 2015.
        """
        if batch.now_ms + entry.compute_ms * self._reach < entry.fresh_ms:
            return
        question = ask.question
        if not question.stores or question.lead or self._asked.get(question.key, 0.0) > time.monotonic():
            return
        early_ms = -entry.compute_ms * question.early_refresh * math.log(1.0 - random.random())
        if batch.now_ms + early_ms >= entry.fresh_ms:
            batch.refreshes[question.key] = ask, entry

    def send(self, batch: Batch) -> None:
        """Ask for the refreshes of a batch; nothing waits for them."""
        if not batch.refreshes:
            return
        now = time.monotonic()
        if len(self._asked) > _REMEMBERED:
            self._asked = {key: until for key, until in self._asked.items() if until > now}
        self._asked |= dict.fromkeys(batch.refreshes, now + _PAUSE)
        command = self._joining.refresh(list(batch.refreshes.values()))
        self._link.post([command]).add_done_callback(self._count)

    def _count(self, asked: asyncio.Future[list[Any]]) -> None:
        if not asked.cancelled() and asked.exception() is None and isinstance(asked.result()[0], list):
            self._counters.add("refreshes", asked.result()[0].count(1))
