"""The parts of an entry, as they lie in Redis and PostgreSQL; shared/entry.py has the layout.

Light: what an application needs to look at an entry, and no decompressor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

_MAGIC = b"mp2"


class Unreadable(ValueError):
    """The bytes are no entry of this version."""


class Envelope(NamedTuple):
    """An entry's head, its meta object and its stored body. Times in milliseconds, as in shared/entry.py."""

    epoch: str
    created_ms: int
    ttl_ms: int
    stale_ms: int
    error_ms: int
    tags: tuple[str, ...]
    about: dict[str, Any]
    data: bytes


def opened(text: bytes) -> Envelope:
    """Take an entry apart, or as much of it as holds the meta object.

    Raises:
        Unreadable: it is of another version, damaged, or not an entry at all.
    """
    try:
        first, rest = text.split(b"\n", 1)
        magic, epoch, created, ttl, stale, error, count = first.split(b" ")
        if magic != _MAGIC:
            raise Unreadable("unknown version")
        *tags, meta, data = rest.split(b"\n", int(count) + 1)
        times = int(created), int(ttl), int(stale), int(error)
        about = orjson.loads(meta)
        if not isinstance(about, dict):
            raise Unreadable("its meta is no object")
        return Envelope(epoch.decode(), *times, tuple(tag.decode() for tag in tags), about, data)
    except ValueError as problem:
        raise Unreadable(str(problem)) from problem
