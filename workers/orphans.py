"""The audit for orphans: flights and waiters whose fill no longer exists.

A fill may vanish by hand, in a failover to a replica that had not heard of it, or among the dead letters. Its flight
would keep new requests waiting for an answer that nobody computes. The audit ends such flights and tells their waiters.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence

from shared.errors import Unavailable
from shared.keys import PartitionKeys
from shared.link import Link
from shared.outbox import Outbox, error_payload
from shared.scripts import SCRIPTS
from shared.settings import Settings
from workers.consumer import server_ms
from workers.joining import LED

log = logging.getLogger("millpond.schedule")

_SCAN_COUNT = 1000
_PAGE = 500
_REPLY_MS = 10_000
_NAME = re.compile(rb"\{mp:(\d+)\}:(flight|waiters):([^:]+)(?::(.+))?")

#: (key, token) of what should have a fill
Candidate = tuple[str, str]


async def audit(link: Link, partitions: int, settings: Settings) -> dict[str, int]:
    """Look through all partitions; return how many flights were seen, ended, and how many waiters were told."""
    counts = {"flights": 0, "flights_ended": 0, "waiters_told": 0}
    suspects, counts["flights"] = await _candidates(link)
    for partition in range(partitions):
        if not suspects[partition]:
            continue
        names = PartitionKeys(partition)
        # Their fills were published before they were seen, and the streams are read from end to end after that: what is
        # not met there has left them for good. Refreshes first: one may move to the fills, never back.
        filled = {token for stream in (names.refreshes, names.fills) for token in await _tokens(link, stream)}
        orphans = sorted(found for found in suspects[partition] if found[1] not in filled and not _led(found[1]))
        for at in range(0, len(orphans), _PAGE):
            ended, told = await _end(link, names, orphans[at : at + _PAGE], settings)
            counts["flights_ended"] += ended
            counts["waiters_told"] += told
    if counts["flights_ended"] or counts["waiters_told"]:
        log.warning("orphans: %(flights_ended)d flights had no fill; %(waiters_told)d waiters were told", counts)
    return counts


def _led(token: str) -> bool:
    """Whether an application computes that flight: without a fill, and who waits for it asks again by himself."""
    return token.startswith(LED)


async def _candidates(link: Link) -> tuple[defaultdict[int, set[Candidate]], int]:
    """Return, per partition, every flight and every list of waiters; and the number of flights."""
    found: defaultdict[int, set[Candidate]] = defaultdict(set)
    flights: set[bytes] = set()
    cursor = b"0"
    while True:
        cursor, page = await link.call(("SCAN", cursor, "MATCH", "{mp:*}:[fw][la]*", "COUNT", _SCAN_COUNT))
        fresh = []
        for name in page:
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            partition, kind, key, token = match.groups()
            if kind == b"waiters" and token:
                found[int(partition)].add((key.decode(), token.decode()))
            elif kind == b"flight" and token is None and name not in flights:
                flights.add(name)
                fresh.append((name, int(partition), key.decode()))
        for (_, partition, key), token in zip(
            fresh, await link.send([("HGET", name, "token") for name, _, _ in fresh]), strict=True
        ):
            if token:
                found[partition].add((key, token.decode()))
        if cursor == b"0":
            return found, len(flights)


async def _tokens(link: Link, stream: str) -> set[str]:
    tokens: set[str] = set()
    start = b"-"
    while True:
        read, last, *page = await link.call(SCRIPTS["aboard"].call([stream], [start, _PAGE]))
        tokens.update(token.decode() for token in page)
        if read < _PAGE:
            return tokens
        start = b"(" + last


async def _end(link: Link, names: PartitionKeys, orphans: Sequence[Candidate], settings: Settings) -> tuple[int, int]:
    """End flights without a fill and tell who waited; return how many of each."""
    ended = await link.send(
        [
            SCRIPTS["orphan"].call([names.flight(key), names.waiters(key, token), names.outcome(key, token)], [token])
            for key, token in orphans
        ]
    )
    lost = error_payload(Unavailable("the computation of this request was lost; ask again"))
    outbox, trims = Outbox(settings.reply_limit), []
    for (key, token), (_, waiters) in zip(orphans, ended, strict=True):
        if waiters:
            outbox.add_waiters(waiters, lost, lost)
            # Only those told: whoever came aboard in between is told by the next audit.
            trims.append(("LTRIM", names.waiters(key, token), len(waiters), -1))
    # Told before they are forgotten: an audit that dies in between is repeated by the next, and a client drops doubles.
    now = server_ms(await link.call(("TIME",)))
    await link.send(outbox.take(now + _REPLY_MS))
    await link.send(trims)
    return sum(removed for removed, _ in ended), sum(len(waiters) for _, waiters in ended)
