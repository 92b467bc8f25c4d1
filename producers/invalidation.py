"""Forgetting answers: what may be named, the entries of the log, and what the invalidation worker reports of them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redis.exceptions import RedisError

from shared.errors import DeadlineExceeded, InvalidRequest, Unavailable
from shared.keys import PartitionKeys
from shared.link import LINK_ERRORS, Command, Link
from shared.messages import label, tags_of
from shared.scripts import SCRIPTS

#: Seconds an inquiry waits for its count, unless told otherwise.
COUNT_WITHIN = 10.0
#: Names in the log that mean something else than an invalidation.
_RESERVED = ("land", "genesis")
_LONGEST_REASON = 500
_KEY = re.compile("[0-9a-f]{32}")
_POLL = (0.01, 0.25)


@dataclass(frozen=True, slots=True, eq=False)
class Invalidation(Mapping[int, str]):
    """What an invalidation, or an inquiry, came to. As a mapping: partition to id in that partition's log.

    `l2` and `l3` count the answers deleted from Redis and from PostgreSQL (of an inquiry: that would be); None where
    nobody waited for the count, it did not come in time, or (`l3`) there is no PostgreSQL. `complete` says whether
    every partition has been swept. In L1, and for every reader, an invalidation is in force at once.
    """

    ids: dict[int, str]
    labels: tuple[str, ...]
    dry_run: bool = False
    l2: int | None = None
    l3: int | None = None
    complete: bool = False

    def __getitem__(self, partition: int) -> str:
        return self.ids[partition]

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be forgotten, by whom and why; only counted if `dry_run`."""

    labels: tuple[str, ...]
    by: str
    reason: str = ""
    dry_run: bool = False


def labels_of(
    *,
    tags: Sequence[str],
    key: str | None,
    profile: str | None,
    tenant: str | None,
    model: str | None,
    prefix: str | None,
    everything: bool,
) -> tuple[str, ...]:
    """Return the labels that name all this in the log.

    Raises:
        InvalidRequest: nothing, or something malformed, was named.
    """
    marked = list(tags_of([tags] if isinstance(tags, str) else list(tags)))
    if key is not None and not (isinstance(key, str) and _KEY.fullmatch(key := key.lower())):
        raise InvalidRequest("key must be the 32 hexadecimal digits of a reply's `key`", field="key")
    named = {"key": key, "profile": profile, "tenant": tenant, "model": model, "prefix": prefix}
    marked += [f"{name}:{label(value, name)}" for name, value in named.items() if value is not None]
    marked += ["all"] if everything else []
    if not marked:
        raise InvalidRequest(
            "name what to forget: tags, key, profile, tenant, model, prefix or everything", field="tags"
        )
    return tuple(marked)


def checked(order: Order) -> Order:
    """Return the order if who and why can be written in the log.

    Raises:
        InvalidRequest: `by` is malformed or reserved, or `reason` too long.
    """
    if label(order.by, "by") in _RESERVED:
        raise InvalidRequest(f"by must not be {order.by!r}: the log uses that name itself", field="by")
    if len(order.reason) > _LONGEST_REASON or not order.reason.replace("\n", " ").isprintable():
        raise InvalidRequest(f"reason must be a text of at most {_LONGEST_REASON} characters", field="reason")
    return order


async def append(link: Link, partitions: Callable[[], Awaitable[int]], order: Order, *, log_limit: int) -> Invalidation:
    """Append the order to every partition's log.

    Raises:
        Unavailable: not every partition's log holds it; again does no harm.
    """
    for attempt in range(4):
        with contextlib.suppress(*LINK_ERRORS, RedisError):
            logs = [PartitionKeys(p) for p in range(await partitions())]
            ids = await link.send([_command(k, order, log_limit) for k in logs])
            break
        await asyncio.sleep(0.05 * 2**attempt)
    else:
        raise Unavailable("the invalidation did not reach every partition: call again once Redis answers")
    if order.dry_run and None in ids:
        raise Unavailable("nothing to count: no worker has started here yet; `millpond up` starts them")
    return Invalidation({p: entry.decode() for p, entry in enumerate(ids)}, order.labels, order.dry_run)


async def counted(link: Link, found: Invalidation, wait: float | None) -> Invalidation:
    """Wait up to `wait` seconds for the invalidation worker, and add its counts.

    Raises:
        DeadlineExceeded: nobody counted what an inquiry asked.
    """
    if found.dry_run and wait is None:
        wait = COUNT_WITHIN
    if wait is None:
        return found
    swept = await _swept(link, [PartitionKeys(p).swept(entry_id) for p, entry_id in found.ids.items()], wait)
    complete = all(done for _, _, done in swept)
    if found.dry_run and not complete:
        raise DeadlineExceeded(
            f"nobody counted within {wait:g} s: is a `millpond worker invalidation` running, and PostgreSQL? "
            "`millpond doctor` says more"
        )
    l2 = _sum([l2 for l2, _, _ in swept])
    return replace(found, l2=l2, l3=_sum([l3 for _, l3, _ in swept]) if complete else None, complete=complete)


def _command(k: PartitionKeys, order: Order, log_limit: int) -> Command:
    if not order.dry_run:
        who = f"{order.by}\n{order.reason}" if order.reason else order.by
        return SCRIPTS["invalidate"].call([k.invalidations, k.tags], [who, log_limit, *order.labels])
    why = ("reason", order.reason) if order.reason else ()
    said = ("by", order.by, "count", "\n".join(order.labels), *why)
    return ("XADD", k.invalidations, "NOMKSTREAM", "MAXLEN", "~", log_limit, "*", *said)


async def _swept(link: Link, names: list[str], wait: float) -> list[tuple[int | None, int | None, bool]]:
    """Return per partition what was deleted from L2 and L3 and whether that is all, as far as known in time."""
    deadline, pause = time.monotonic() + wait, _POLL[0]
    found: list[Any] = [[None] * 3] * len(names)
    while True:
        with contextlib.suppress(*LINK_ERRORS, RedisError):
            found = await link.send([("HMGET", name, "l2", "l3", "done") for name in names])
        if time.monotonic() >= deadline or all(done for _, _, done in found):
            return [(_number(l2), _number(l3), bool(done)) for l2, l3, done in found]
        await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(1.5 * pause, _POLL[1])


def _number(value: bytes | None) -> int | None:
    return None if value is None else int(value)


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None
