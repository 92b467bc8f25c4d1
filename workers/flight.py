"""A flight as the LLM worker sees it: the fill that asks for it, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from shared.entry import payload, tail_of, unpack
from shared.errors import from_wire
from workers.consumer import Message
from workers.outbox import error_payload


class LeaseLost(Exception):
    """Another worker owns the fill now: nothing more may be written for it."""


@dataclass(frozen=True, slots=True)
class Fill:
    """A flight to compute."""

    stream: str
    id: bytes
    key: str
    token: str
    epoch: str
    body: bytes
    endpoint: str
    model: str
    tags: str
    ttl_ms: int
    stale_ms: int
    error_ms: int
    probation_ms: int
    #: what the request says of itself for the statistics: profile, tenant, experiment, variant
    about: dict[str, Any]

    @classmethod
    def read(cls, stream: str, message: Message) -> Fill:
        """Read a message of the fills or refreshes.

        Raises:
            ValueError, KeyError, TypeError: it is not one.
        """
        fields = message.fields
        spec = orjson.loads(fields[b"spec"])
        return cls(
            stream=stream,
            id=message.id,
            key=fields[b"key"].decode(),
            token=fields[b"token"].decode(),
            epoch=fields[b"epoch"].decode(),
            body=fields[b"body"],
            endpoint=spec["endpoint"],
            model=spec["model"],
            tags="\n".join(spec["tags"]),
            ttl_ms=int(spec["ttl_ms"]),
            stale_ms=int(spec["stale_ms"]),
            error_ms=int(spec["error_ms"]),
            probation_ms=int(spec["probation_ms"]),
            about={name: spec.get(name) for name in ("profile", "tenant", "experiment", "variant")},
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a flight came to, and for whom: one payload for who began it, one for who joined.

    `now_ms` is the server's clock at the step that settled it and renewed the lease.
    """

    now_ms: int
    waiters: list[bytes]
    first: bytes
    rest: bytes

    @classmethod
    def landed(cls, fill: Fill, reply: list[Any], body: bytes, provider: str) -> Outcome:
        """Read `land`'s reply for an answer this worker has just computed."""
        reason, now_ms, waiters, fresh_ms = reply
        tail = tail_of(fill.key, fill.model, body, provider=provider, epoch=fill.epoch)
        first, rest = (payload("llm", late, reason.decode(), now_ms, fresh_ms, now_ms, tail) for late in (False, True))
        return cls(now_ms, waiters, first, rest)

    @classmethod
    def recorded(cls, fill: Fill, reply: list[Any]) -> Outcome:
        """Read a `DONE` reply: the outcome an earlier worker, or an earlier try, had reached."""
        _, now_ms, waiters, text = reply
        reason, _, record = text.partition(b"\n")
        if reason == b"failed":
            error = error_payload(from_wire(orjson.loads(record)))
            return cls(now_ms, waiters, error, error)
        entry = unpack(fill.key, record)
        first, rest = (
            payload("llm", late, reason.decode(), entry.created_ms, entry.fresh_ms, now_ms, entry.tail)
            for late in (False, True)
        )
        return cls(now_ms, waiters, first, rest)
