"""Dead letters: what nobody could handle, why, and how to try it again.

A letter lies in its partition's `dead` stream: `reason`, `stream`, `id`, `deliveries`, and the message's own fields
each behind `m:`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import redis

from shared.errors import InvalidRequest
from shared.keys import PartitionKeys
from shared.settings import Settings

_PAGE = 500


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. `id` is unique within its partition; `message` holds the original fields."""

    partition: int
    id: str
    reason: str
    stream: str
    original_id: str
    deliveries: int
    message: dict[str, bytes]

    @property
    def retryable(self) -> bool:
        """Whether the message still holds what a new request needs."""
        return "body" in self.message

    def as_json(self, *, whole: bool) -> dict[str, Any]:
        """Return the letter for JSON; `whole` with the message's fields, decoded where they are JSON."""
        about: dict[str, Any] = {
            "partition": self.partition,
            "id": self.id,
            "reason": self.reason,
            "stream": self.stream,
            "original_id": self.original_id,
            "deliveries": self.deliveries,
            "retryable": self.retryable,
        }
        return about | {"message": {n: _readable(v) for n, v in self.message.items()}} if whole else about


def letters(connection: redis.Redis, partitions: range) -> Iterator[Letter]:
    """Yield the dead letters of these partitions, oldest first within each."""
    for names in map(PartitionKeys, partitions):
        after = "-"
        while page := connection.execute_command("XRANGE", names.dead, after, "+", "COUNT", _PAGE):
            for letter_id, fields in page:
                yield _letter(names.partition, letter_id, fields)
            after = "(" + page[-1][0].decode()


def find(connection: redis.Redis, partitions: range, letter_id: str) -> Letter:
    """Return one letter by its id.

    Raises:
        InvalidRequest: there is none, or several partitions have one with this id.
    """
    found = []
    for names in map(PartitionKeys, partitions):
        try:
            page = connection.execute_command("XRANGE", names.dead, letter_id, letter_id)
        except redis.ResponseError:
            raise InvalidRequest(f"{letter_id!r} is no id; `millpond dead list` shows them", field="id") from None
        found += [_letter(names.partition, at, fields) for at, fields in page]
    if not found:
        raise InvalidRequest(f"no dead letter {letter_id}; `millpond dead list` shows them", field="id")
    if len(found) > 1:
        where = ", ".join(str(letter.partition) for letter in found)
        raise InvalidRequest(f"partitions {where} each have a letter {letter_id}: add --partition", field="partition")
    return found[0]


def retry(connection: redis.Redis, letter: Letter, settings: Settings) -> bool:
    """Publish the letter's message once more and remove the letter, both or neither.

    A request goes out as it was (a deadline that has passed is set anew), a fill as a request that nobody waits for:
    its answer is stored as its directives say. Returns False when the letter was retried or removed meanwhile.

    Raises:
        InvalidRequest: the letter holds no message to retry.
    """
    if not letter.retryable:
        raise InvalidRequest(f"letter {letter.id} holds no request: it can only be read", field="id")
    names = PartitionKeys(letter.partition)
    now = connection.execute_command("TIME")
    fresh = _request(letter, int(now[0] * 1000 + now[1] // 1000), settings)
    pairs = [part for name, value in fresh.items() for part in (name, value)]
    with connection.pipeline(transaction=True) as pipe:
        try:
            pipe.watch(names.dead)
            if not pipe.execute_command("XRANGE", names.dead, letter.id, letter.id):
                return False
            pipe.multi()
            pipe.execute_command("XADD", names.requests, "*", *pairs)
            pipe.execute_command("XDEL", names.dead, letter.id)
            pipe.execute()
        except redis.WatchError:  # another letter came or went: look again
            return retry(connection, letter, settings)
    return True


def discard(connection: redis.Redis, letter: Letter) -> bool:
    """Remove the letter for good; False when it was removed meanwhile."""
    return bool(connection.execute_command("XDEL", PartitionKeys(letter.partition).dead, letter.id))


def discard_all(connection: redis.Redis, partitions: range) -> list[str]:
    """Remove the letters that lie in these partitions now, not those that come meanwhile; return their ids."""
    removed: list[str] = []
    for names in map(PartitionKeys, partitions):
        newest = connection.execute_command("XREVRANGE", names.dead, "+", "-", "COUNT", 1)
        while newest and (page := connection.execute_command("XRANGE", names.dead, "-", newest[0][0], "COUNT", _PAGE)):
            ids = [letter_id for letter_id, _ in page]
            connection.execute_command("XDEL", names.dead, *ids)
            removed += [letter_id.decode() for letter_id in ids]
    return removed


def _request(letter: Letter, now_ms: int, settings: Settings) -> dict[str, bytes]:
    fresh_deadline = str(now_ms + int(settings.timeout * 1000)).encode()
    if "spec" not in letter.message:
        deadline = letter.message.get("deadline", b"")
        passed = not deadline.isdigit() or int(deadline) <= now_ms
        return letter.message | ({"deadline": fresh_deadline} if passed else {})
    request = {
        "id": f"retry-{letter.id}".encode(),
        "reply": b"",
        "deadline": fresh_deadline,
        "body": letter.message["body"],
    }
    directives = orjson.loads(letter.message["spec"]).get("cache")
    return request | ({"cache": orjson.dumps(directives)} if directives else {})


def _letter(partition: int, letter_id: bytes, fields: dict[bytes, bytes]) -> Letter:
    about = {n.decode(): v.decode(errors="replace") for n, v in fields.items() if not n.startswith(b"m:")}
    deliveries = about.get("deliveries", "")
    return Letter(
        partition=partition,
        id=letter_id.decode(),
        reason=about.get("reason", "unknown"),
        stream=about.get("stream", ""),
        original_id=about.get("id", ""),
        deliveries=int(deliveries) if deliveries.isdigit() else 0,
        message={n[2:].decode(errors="replace"): v for n, v in fields.items() if n.startswith(b"m:")},
    )


def _readable(value: bytes) -> Any:
    try:
        return orjson.loads(value) if value[:1] in (b"{", b"[") else value.decode()
    except ValueError:
        return value.decode(errors="backslashreplace")
