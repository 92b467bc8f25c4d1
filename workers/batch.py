"""What a lookup worker has in hand during one turn: the requests it read, what became of them so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from shared.counters import Counters
from shared.entry import Entry
from shared.errors import InvalidRequest
from shared.link import Command
from shared.messages import Kind, Question, label
from shared.outbox import Outbox
from shared.touches import Touches
from workers.consumer import Message


@dataclass(slots=True)
class Ask:
    """One request of a batch."""

    message_id: bytes
    request_id: bytes
    client: str
    deadline_ms: int
    body: bytes
    cache: bytes | None
    question: Question


@dataclass(slots=True)
class Hits:
    """The requests of one client that one entry answers. `since_ms`: when the first of them was published."""

    entry: Entry
    since_ms: int
    request_ids: list[bytes]


@dataclass(slots=True)
class Batch:
    """What one turn has in hand. `not_after_ms`: when this worker's claim on it may end, by the server's clock."""

    now_ms: int
    not_after_ms: int
    outbox: Outbox
    answered: list[bytes] = field(default_factory=list)
    #: the requests that an entry answers, by client, tier, key and kind: told in one payload
    hits: dict[tuple[str, str, str, Kind], Hits] = field(default_factory=dict)
    #: requests of other partitions: the commands that hand them over, and the messages to retire once they did
    moves: list[Command] = field(default_factory=list)
    moved: list[bytes] = field(default_factory=list)
    #: dead letters and unreadable entries to do away with
    chores: list[Command] = field(default_factory=list)
    #: entries to be refreshed: expired softly, or about to
    refreshes: dict[str, tuple[Ask, Entry]] = field(default_factory=dict)
    missing: dict[tuple[Question, bytes], list[Ask]] = field(default_factory=dict)

    def hit(self, ask: Ask, entry: Entry, tier: str) -> None:
        """Answer one request from `tier`, together with all others of its client and kind for the same entry."""
        self.answered.append(ask.message_id)
        kind = ask.question.kind
        found = self.hits.get(group := (ask.client, tier, entry.key, kind))
        if found is None:
            self.hits[group] = Hits(entry, int(ask.message_id.split(b"-")[0]), [ask.request_id])
        else:
            found.request_ids.append(ask.request_id)

    def answer(self, ask: Ask, payload: bytes) -> None:
        """Reply to one request and let its message be retired."""
        self.outbox.add(ask.client, ask.request_id, payload)
        self.answered.append(ask.message_id)

    def take(self, counters: Counters, touches: Touches) -> tuple[list[Command], list[bytes]]:
        """Return the replies so far, and the messages they answer; count the hits."""
        for (client, tier, _, kind), hits in self.hits.items():
            entry, count = hits.entry, len(hits.request_ids)
            counters.add(f"hit.{tier}", count)
            touches.hit(tier, kind, entry, count, self.now_ms - hits.since_ms)
            self.outbox.add(client, b" ".join(hits.request_ids), entry.reply(tier, self.now_ms))
        answered, self.answered = self.answered, []
        self.hits.clear()
        return self.outbox.take(self.not_after_ms), answered


def fits(entry: Entry, question: Question, now_ms: int) -> bool:
    """Whether an entry is fresh enough for a request."""
    if question.lead and entry.fresh_ms <= now_ms:
        return False  # nobody else can refresh what the application computes
    return question.max_age_ms is None or entry.created_ms >= now_ms - question.max_age_ms


@lru_cache(4096)
def channel_of(reply: bytes) -> str:
    """Return the name of a reply channel ('': nobody waits); raise `InvalidRequest` if it cannot be one."""
    try:
        return label(reply.decode(), "reply") if reply else ""
    except UnicodeDecodeError:
        raise InvalidRequest("reply must be UTF-8", field="reply") from None


def read_ask(message: Message, understand: Callable[[bytes, bytes | None], Question], latest_ms: int) -> Ask:
    """Read a message of the request stream. A deadline beyond `latest_ms` counts as that.

    Raises:
        InvalidRequest: with the offending `field`.
    """
    fields = message.fields
    try:
        request_id, body = fields[b"id"], fields[b"body"]
        deadline_ms = min(int(fields[b"deadline"]), latest_ms)
    except KeyError as missing:
        name = missing.args[0].decode()
        raise InvalidRequest(f"the request has no field {name!r}", field=name) from None
    except ValueError:
        raise InvalidRequest("deadline must be a whole number of milliseconds", field="deadline") from None
    client = channel_of(fields.get(b"reply", b""))
    try:
        label(request_id.decode(), "id")
    except UnicodeDecodeError:
        raise InvalidRequest("id must be UTF-8", field="id") from None
    cache = fields.get(b"cache")
    question = understand(body, cache)
    if question.lead and not client:
        raise InvalidRequest("who computes needs a reply channel", field="reply")
    return Ask(message.id, request_id, client, deadline_ms, body, cache, question)
