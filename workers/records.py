"""What the persistence worker reads from its streams, as rows of the durable tier. Pure: no server is asked.

Whatever does not read as the protocol says raises `Unreadable`, so that it goes to the dead letters once and at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import orjson

from shared.entry import unpack
from shared.envelope import Unreadable, opened
from shared.settings import recorded
from shared.touches import BOUNDS, TIERS

#: Latency buckets of a hit's histogram.
BUCKETS = len(BOUNDS) + 1
_Binary = bytes  # `answers` has a column named bytes
_BIRTH = datetime(1970, 1, 1, tzinfo=UTC)
_INT, _BIGINT = (1 << 31) - 1, (1 << 63) - 1
#: Longest dimension of a statistic, in bytes.
_LONGEST = 400
#: Postgres' timestamps and Python's both end later.
_LAST_MS = 253_000_000_000_000


class AnswerRow(NamedTuple):
    """One row of `answers`. `tags` are newline-joined, `prompt` is JSON text."""

    key: _Binary
    partition: int
    epoch_ms: int
    epoch_seq: int
    created: datetime
    fresh: datetime
    expires: datetime
    gone: datetime
    tags: str
    profile: str
    tenant: str
    model: str
    provider: str | None
    endpoint: str | None
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    compute_ms: int
    bytes: int
    entry: _Binary
    prompt: str | None

    @property
    def age(self) -> tuple[int, int, datetime]:
        """What decides between two answers to one key: the newer epoch, then the later one."""
        return self.epoch_ms, self.epoch_seq, self.created


class CallRow(NamedTuple):
    """One row of `calls`: one attempt at a provider."""

    at: datetime
    partition: int
    id: str
    attempt: int
    key: bytes
    profile: str
    tenant: str
    model: str
    provider: str | None
    endpoint: str | None
    kind: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    duration_ms: int
    experiment: str | None
    variant: str | None


class HitRow(NamedTuple):
    """One row of `hits`: an hour's requests of one kind. `histogram` is PostgreSQL's array text."""

    hour: datetime
    tier: str
    profile: str
    tenant: str
    model: str
    experiment: str
    variant: str
    hits: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    saved_ms: int
    histogram: str


@dataclass(frozen=True, slots=True)
class Landed:
    """One message of `landed`: what a flight, or an application, came to."""

    id: bytes
    answer: AnswerRow | None
    calls: tuple[CallRow, ...]


@dataclass(frozen=True, slots=True)
class Touched:
    """One message of `touches`: `keys` has the hits of each key, `stats` (dimensions, sums, histogram)."""

    id: bytes
    at: datetime
    keys: dict[bytes, int]
    stats: tuple[tuple[tuple[str, ...], tuple[int, int, int, float, int], tuple[int, ...]], ...]

    @property
    def hour(self) -> datetime:
        """The hour it counts in, by Redis' clock."""
        return self.at.replace(minute=0, second=0, microsecond=0)


def read_landed(partition: int, message_id: bytes, fields: dict[bytes, bytes]) -> Landed:
    """Read a message of `landed`.

    Raises:
        Unreadable: the entry or the call is none; the message says what is wrong with it.
    """
    try:
        key = _key(fields[b"key"])
        call = _object(fields[b"call"], "call") if b"call" in fields else None
        entry, prompt = fields.get(b"entry"), _prompt(fields.get(b"prompt"))
        answer = None if entry is None else _answer(partition, key, entry, call, prompt)
        calls = () if call is None else _calls(partition, message_id, key, fields[b"outcome"].decode(), call)
    except KeyError as error:
        raise Unreadable(f"no field {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Unreadable(str(error)) from error
    if answer is None and not calls:
        raise Unreadable("neither an entry nor a call")
    return Landed(message_id, answer, calls)


def read_touches(message_id: bytes, fields: dict[bytes, bytes]) -> Touched:
    """Read a message of `touches`.

    Raises:
        Unreadable: it is no report of hits; the message says what is wrong with it.
    """
    try:
        data = _object(fields[b"data"], "data")
        keys = {_key(k.encode()): sum(_count(n, "hits") for n in counts) for k, counts in data.get("keys", {}).items()}
        return Touched(message_id, _when(message_id), keys, tuple(_stat(row) for row in data.get("stats", ())))
    except KeyError as error:
        raise Unreadable(f"no field {error}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Unreadable(str(error)) from error


@dataclass(slots=True)
class _Sum:
    counts: list[float] = field(default_factory=lambda: [0, 0, 0, 0.0, 0])
    histogram: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, counts: tuple[float, ...], histogram: tuple[int, ...]) -> None:
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.histogram = [a + b for a, b in zip(self.histogram, histogram, strict=True)]


def hit_rows(touched: Iterable[Touched]) -> list[HitRow]:
    """Return the sums of some reports, one row per primary key, in its order."""
    sums: defaultdict[tuple[Any, ...], _Sum] = defaultdict(_Sum)
    for report in touched:
        for dimensions, counts, histogram in report.stats:
            sums[report.hour, *dimensions].add(counts, histogram)
    rows = []
    for name in sorted(sums):
        hits, prompt, completion, cost, saved = sums[name].counts
        text = ",".join(map(str, sums[name].histogram))
        rows.append(HitRow._make((*name, int(hits), int(prompt), int(completion), cost, int(saved), f"{{{text}}}")))
    return rows


def top_rows(touched: Iterable[Touched], *, most: int) -> list[tuple[datetime, bytes, int]]:
    """Return (hour, key, hits) of the keys hit most in these reports, at most `most`, in order."""
    sums: defaultdict[tuple[datetime, bytes], int] = defaultdict(int)
    for report in touched:
        for key, hits in report.keys.items():
            sums[report.hour, key] += hits
    popular = sorted(((hits, at) for at, hits in sums.items()), reverse=True)[:most]
    return sorted((hour, key, hits) for hits, (hour, key) in popular)


def experiment_rows(
    seen: Iterable[tuple[datetime, str | None, str | None]],
) -> list[tuple[str, str, datetime, datetime]]:
    """Return (name, variant, first seen, last seen) of (when, experiment, variant) triples, in order."""
    spans: dict[tuple[str, str], tuple[datetime, datetime]] = {}
    for at, name, variant in seen:
        if name:
            first, last = spans.get((name, variant or ""), (at, at))
            spans[name, variant or ""] = min(first, at), max(last, at)
    return [(*name, *spans[name]) for name in sorted(spans)]


def _answer(partition: int, key: bytes, text: bytes, call: dict[str, Any] | None, prompt: str | None) -> AnswerRow:
    found = unpack(key.hex(), text)
    about = opened(text).about
    marks = dict(tag.split(":", 1) for tag in found.tags if tag.startswith(("profile:", "tenant:")))
    epoch_ms, epoch_seq = (int(part) for part in found.epoch.split("-"))
    if max(epoch_ms, epoch_seq) > _BIGINT:
        raise Unreadable("an epoch out of range")
    return AnswerRow(
        key=key,
        partition=partition,
        epoch_ms=epoch_ms,
        epoch_seq=epoch_seq,
        created=_time(found.created_ms),
        fresh=_time(found.fresh_ms),
        expires=_time(found.expires_ms),
        gone=_time(found.gone_ms),
        tags="\n".join(found.tags),
        profile=marks.get("profile", ""),
        tenant=marks.get("tenant", ""),
        model=_text(about["model"], "model"),
        provider=_provider(about["provider"], call is not None and call.get("simulated")),
        endpoint=None if call is None else _known(call.get("endpoint"), "endpoint"),
        prompt_tokens=_count(found.tokens[0], "tokens", _INT),
        completion_tokens=_count(found.tokens[1], "tokens", _INT),
        cost=_dollars(found.cost),
        compute_ms=_count(found.compute_ms, "compute_ms", _INT),
        bytes=len(text),
        entry=text,
        prompt=prompt,
    )


def _calls(partition: int, message_id: bytes, key: bytes, outcome: str, call: dict[str, Any]) -> tuple[CallRow, ...]:
    """Return a row per attempt. The last answered, or failed for good: it has the tokens and the cost."""
    prompt, completion = call.get("tokens") or (0, 0)
    whole = CallRow(
        at=_when(message_id),
        partition=partition,
        id=message_id.decode(),
        attempt=0,
        key=key,
        profile=_text(call["profile"], "profile"),
        tenant=_text(call["tenant"], "tenant"),
        model=_text(call["model"], "model"),
        provider=_provider(call.get("provider"), call.get("simulated")),
        endpoint=_known(call.get("endpoint"), "endpoint"),
        kind=_text(call.get("kind") or "fill", "kind"),
        outcome=outcome,
        prompt_tokens=_count(prompt, "tokens", _INT),
        completion_tokens=_count(completion, "tokens", _INT),
        cost=_dollars(call.get("cost")),
        duration_ms=_count(call.get("duration_ms") or 0, "duration_ms", _INT),
        experiment=_known(call.get("experiment"), "experiment"),
        variant=_known(call.get("variant"), "variant"),
    )
    attempts = call.get("attempts") or [{}]
    rows = []
    for number, attempt in enumerate(attempts):
        own = whole._replace(
            attempt=number,
            model=_text(attempt.get("model") or whole.model, "model"),
            provider=_provider(attempt.get("provider"), attempt.get("simulated")) or whole.provider,
            duration_ms=_count(attempt.get("duration_ms", whole.duration_ms), "duration_ms", _INT),
        )
        if number < len(attempts) - 1:
            failed = _text(attempt.get("outcome") or "failed", "outcome")
            own = own._replace(outcome=failed, prompt_tokens=0, completion_tokens=0, cost=None)
        rows.append(own)
    return tuple(rows)


def _stat(row: list[Any]) -> tuple[tuple[str, ...], tuple[int, int, int, float, int], tuple[int, ...]]:
    if len(row) != 12:
        raise Unreadable(f"a statistic has 12 parts, not {len(row)}")
    tier, profile, tenant, model, experiment, variant, hits, prompt, completion, cost, saved, histogram = row
    if tier not in TIERS:
        raise Unreadable(f"no tier is named {tier!r}")
    if len(histogram) != BUCKETS:
        raise Unreadable(f"a histogram has {BUCKETS} buckets, not {len(histogram)}")
    dimensions = (tier, profile, tenant, model, experiment or "", variant or "")
    counts = tuple(_count(n, "counts") for n in (hits, prompt, completion, round(saved)))
    return (
        # All of them are in one key of an index, which holds no more; other requests' figures are in the same message.
        tuple(_text(part, "dimension").encode()[:_LONGEST].decode(errors="ignore") for part in dimensions),
        (counts[0], counts[1], counts[2], _dollars(cost) or 0.0, counts[3]),
        tuple(_count(n, "histogram") for n in histogram),
    )


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"{what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Unreadable(f"{what} is no object")
    return found


def _key(text: bytes) -> bytes:
    try:
        key = bytes.fromhex(text.decode())
    except ValueError:
        key = b""
    if len(key) != 16:
        raise Unreadable(f"no key: {text[:40]!r}")
    return key


def _prompt(text: bytes | None) -> str | None:
    """Return a prompt as PostgreSQL keeps it; what it cannot keep is not worth losing an answer."""
    if text is None:
        return None
    try:
        orjson.loads(text)
        return text.replace(b"\\u0000", b"\\ufffd").decode()  # jsonb has no NUL
    except ValueError:
        return None


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"{what} is no text")
    return value


def _known(value: object, what: str) -> str | None:
    return _text(value, what) if value else None


def _provider(name: object, simulated: object) -> str | None:
    """Return the name to record: that of a simulated provider says so."""
    known = _known(name, "provider")
    return recorded(known, simulated=bool(simulated)) if known else known


def _count(value: object, what: str, most: int = _BIGINT // 1_000_000) -> int:
    """Return a count that may be summed with a million of its like."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise Unreadable(f"{what}: {value!r} is no count")
    return value


def _dollars(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise Unreadable(f"cost: {value!r} is no sum of money")
    return float(value)


def _when(message_id: bytes) -> datetime:
    return _time(int(message_id.split(b"-")[0]))


def _time(ms: int) -> datetime:
    if not 0 <= ms <= _LAST_MS:
        raise Unreadable(f"{ms} ms is no time")
    return _BIRTH + timedelta(milliseconds=ms)
