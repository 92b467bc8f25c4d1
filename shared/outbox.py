"""Replies on their way out: one stream entry per client and batch, refused by the server once they are too late."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import orjson

from shared import keys
from shared.errors import MillpondError
from shared.link import Command
from shared.scripts import SCRIPTS

_PAIRS = 256
#: How a waiter stands in its flight's list: 0 it began the flight, 1 it joined; 2 and 3 likewise, and it takes no
#: stored answer instead.
JOINED = (b"1", b"3")
STRICT = (b"2", b"3")


def error_payload(error: MillpondError) -> bytes:
    """Return the reply payload of an error."""
    return orjson.dumps({"error": error.to_wire()})


class Outbox:
    """Replies of one batch, by client. A payload goes out once for all the requests it answers in one entry."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._replies: defaultdict[str, list[bytes]] = defaultdict(list)

    def add(self, client: str, request_ids: bytes, payload: bytes) -> None:
        """Answer requests (ids separated by spaces); a client that gave no reply channel ('') gets none."""
        if client:
            self._replies[client] += (request_ids, payload)

    def add_waiters(self, waiters: Sequence[bytes], first: bytes, rest: bytes, strict: bytes | None = None) -> None:
        """Answer everyone aboard a flight: who began it with `first`, who joined with `rest`.

        Those who take no stored answer get `strict` instead, if it is given; nothing if it is empty.
        """
        groups: defaultdict[tuple[str, bytes], dict[bytes, None]] = defaultdict(dict)
        for aboard in waiters:
            client, request_id, how, *_ = aboard.split(b" ")
            groups[client.decode(), how][request_id] = None
        for (to, how), ids in groups.items():
            payload = rest if how in JOINED else first
            if strict is not None and how in STRICT:
                payload = strict
            if payload:
                self._replies[to] += (b" ".join(ids), payload)

    def take(self, not_after_ms: int) -> list[Command]:
        """Return the commands that send everything, unless the server's clock is past `not_after_ms`; empty it."""
        replies, self._replies = self._replies, defaultdict(list)
        return [
            SCRIPTS["reply"].call([keys.reply(client)], [not_after_ms, self._limit, *pairs[at : at + 2 * _PAIRS]])
            for client, pairs in replies.items()
            for at in range(0, len(pairs), 2 * _PAIRS)
        ]


def waiter(client: str, request_id: bytes, *counted: str | None) -> bytes:
    """Return how a request stands among a flight's waiters; b'' when nobody waits.

    `counted`: the experiment and the variant it counts under, where it names them.
    """
    return b" ".join((client.encode(), request_id, *(one.encode() for one in counted if one))) if client else b""
