"""A flight as the LLM worker sees it: the fill that asks for it, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from shared.entry import Entry, payload, tail_of, unpack
from shared.errors import from_wire
from shared.outbox import error_payload
from shared.profiles import DEFAULT_PROFILE
from shared.providers.chain import Attempt
from shared.values import framed
from workers.consumer import Message

_ABOUT = {"profile": DEFAULT_PROFILE, "tenant": "default", "experiment": None, "variant": None}


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
    #: after this long, those aboard get an entry kept for errors (0: never)
    soft_timeout_ms: int
    #: an error is answered for this long (0: not at all)
    negative_ms: int
    mode: str
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
            stale_ms=int(spec.get("stale_ms", 0)),
            error_ms=int(spec.get("error_ms", 0)),
            probation_ms=int(spec.get("probation_ms", spec["ttl_ms"])),
            soft_timeout_ms=int(spec.get("soft_timeout_ms") or 0),
            negative_ms=int(spec.get("negative_ms", 0)),
            mode=str(spec.get("mode", "default")),
            about={name: spec.get(name, default) for name, default in _ABOUT.items()},
        )


@dataclass(slots=True)
class Progress:
    """What has happened to a flight while this worker computes it."""

    attempts: list[Attempt] = field(default_factory=list)
    #: the first so many waiters have had an answer (the soft time-out)
    placated: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a flight came to, and for whom: one payload for who began it, one for who joined.

    `now_ms` is the server's clock at the step that settled it and renewed the lease. `strict` is for those who take no
    stored answer (None: they get what the others get); `spare` is the entry that stands in for an answer.
    """

    now_ms: int
    waiters: list[bytes]
    first: bytes
    rest: bytes
    strict: bytes | None = None
    spare: Entry | None = None

    @classmethod
    def landed(
        cls, fill: Fill, reply: list[Any], body: bytes, provider: str, value: dict[str, Any] | None = None
    ) -> Outcome:
        """Read `land`'s reply for an answer this worker has just computed; `value` if its body is no JSON."""
        reason, now_ms, waiters, fresh_ms = reply
        text, blob = (orjson.dumps(value), body) if value else (body, None)
        tail = tail_of(fill.key, fill.model, text, provider=provider, epoch=fill.epoch)
        return cls(now_ms, waiters, *_payloads(reason, now_ms, fresh_ms, now_ms, tail, blob))

    @classmethod
    def recorded(cls, fill: Fill, reply: list[Any]) -> Outcome:
        """Read the outcome that `fail` has just recorded, or (`DONE`) that an earlier worker or try had reached."""
        _, now_ms, waiters, text = reply
        reason, _, record = text.partition(b"\n")
        if reason in (b"failed", b"stale"):
            problem, _, kept = record.partition(b"\n")
            error = error_payload(from_wire(orjson.loads(problem)))
            if reason == b"failed":
                return cls(now_ms, waiters, error, error)
            return cls.standing_in(unpack(fill.key, kept), now_ms, waiters, error)
        entry = unpack(fill.key, record)
        told = _payloads(reason, entry.created_ms, entry.fresh_ms, now_ms, entry.tail, entry.blob)
        return cls(now_ms, waiters, *told)

    @classmethod
    def standing_in(cls, entry: Entry, now_ms: int, waiters: list[bytes], strict: bytes | None) -> Outcome:
        """Return the outcome that serves an entry kept for errors."""
        first, rest = (entry.reply("l2", now_ms, collapsed=late, degraded=True) for late in (False, True))
        return cls(now_ms, waiters, first, rest, strict, entry)


def _payloads(
    stored: bytes, created_ms: int, fresh_ms: int, now_ms: int, tail: bytes, blob: bytes | None
) -> tuple[bytes, bytes]:
    """Return the reply of who began a flight, and of who joined it."""
    first, rest = (payload("llm", late, stored.decode(), created_ms, fresh_ms, now_ms, tail) for late in (False, True))
    return framed(first, blob), framed(rest, blob)
