"""Deleting physically what invalidations have made void: in L2 by the markers, in L3 by labels and epochs.

Both judge every answer as it lies at that moment, against epochs: sweeping twice, late, or by a worker that was frozen
meanwhile deletes nothing that is valid.
"""

# ruff: noqa: S608 (statements are put together from this module's constants)
from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from asyncpg import Pool

from shared.keys import PartitionKeys
from shared.link import Link
from shared.scripts import SCRIPTS

Epoch = tuple[int, int]
#: key, epoch, labels
Answer = tuple[str, Epoch, Sequence[str]]
T = TypeVar("T")

_SCAN = 500
_PER_SCRIPT = 50  # less than a millisecond of the server
_LABELS = 500
_MOST_OTHERS = 100_000
_ROWS = 20_000
_ROWS_AT_ONCE = 2000
_KEY = re.compile("[0-9a-f]{32}")
_PREFIX = "prefix:"


def epoch_of(entry_id: str) -> Epoch:
    """Return an id of the log, `MS-SEQ`, as a pair that compares."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of the invalidation log. An inquiry only wants to know what it would delete."""

    id: str
    labels: tuple[str, ...]
    by: str = ""
    reason: str = ""
    inquiry: bool = False

    @classmethod
    def read(cls, entry_id: bytes, fields: Mapping[bytes, bytes]) -> LogEntry:
        """Read one; whatever cannot be read names nothing."""
        inquiry = b"tags" not in fields
        names = (b"count" if inquiry else b"tags", b"by", b"reason")
        # PostgreSQL knows no text with a zero byte; nor is there a label with one, save where somebody wrote by hand.
        labels, by, reason = (fields.get(n, b"").decode(errors="replace").replace("\0", "\ufffd") for n in names)
        return cls(entry_id.decode(), tuple(filter(None, labels.split("\n"))), by, reason, inquiry)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be deleted for it: a landing only tells holders of the replaced answer."""
        return self.by == "land" or not self.labels


class Tally:
    """Counts what was deleted for each entry of the log. An answer counts once, for the first entry that voids it.

    A scan deletes all that the markers void, also what they do since the log was read: what was deleted `ahead` of
    these entries counts for them.
    """

    def __init__(self, log: Iterable[LogEntry], ahead: Iterable[Answer] = ()) -> None:
        self.counts: Counter[str] = Counter()
        #: deleted for something else: for what the log said after it was last read, most likely
        self.others: list[Answer] = []
        self._marks: dict[str, list[Epoch]] = {}
        self._prefixes: list[tuple[Epoch, str]] = []
        self._ids: dict[Epoch, str] = {}
        for entry in sorted(log, key=lambda entry: epoch_of(entry.id)):
            at = epoch_of(entry.id)
            self._ids[at] = entry.id
            for label in entry.labels:
                if label.startswith(_PREFIX) and label != _PREFIX:
                    self._prefixes.append((at, label[len(_PREFIX) :]))
                else:
                    self._marks.setdefault(label, []).append(at)
        for answer in ahead:
            self._count(*answer)

    def add(self, key: str, epoch: Epoch, labels: Sequence[str]) -> None:
        """Count an answer of these labels that began at `epoch`."""
        if not self._count(key, epoch, labels) and len(self.others) < _MOST_OTHERS:
            self.others.append((key, epoch, labels))

    def _count(self, key: str, epoch: Epoch, labels: Sequence[str]) -> bool:
        concerned = [self._marks.get(label, ()) for label in ("all", f"key:{key}", *labels)]
        found = [at for marks in concerned for at in marks if at > epoch]
        found += [at for at, prefix in self._prefixes if at > epoch and any(x.startswith(prefix) for x in labels)]
        if found:
            self.counts[self._ids[min(found)]] += 1
        return bool(found)


async def sweep_l2(link: Link, keys: PartitionKeys, tally: Tally, *, log: Sequence[LogEntry] | None = None) -> int:
    """Delete from Redis the partition's entries that its markers void; return how many.

    `log` narrows the look to single keys where it names nothing else. The scan is as polite as it can be: small
    steps, and as much time between two of them as each took.
    """
    single = log and {label[4:] for entry in log for label in entry.labels if label.startswith("key:")}
    if log and single and all(label.startswith("key:") for entry in log for label in entry.labels):
        pages = _pages([keys.entry(key) for key in single], _PER_SCRIPT)
        return sum([await _judge(link, keys, list(page), ["delete", ""], tally) for page in pages])
    return sum([await _judge(link, keys, names, ["delete", ""], tally) async for names in _entries(link, keys)])


async def find_l2(link: Link, keys: PartitionKeys, tally: Tally, labels: Iterable[str]) -> int:
    """Count what Redis holds of these labels, deleting nothing."""
    asked = ["find", "\n".join(labels)]
    return sum([await _judge(link, keys, names, asked, tally) async for names in _entries(link, keys)])


async def _entries(link: Link, keys: PartitionKeys) -> AsyncIterator[list[str]]:
    cursor = b"0"
    while True:
        cursor, found = await link.call(("SCAN", cursor, "MATCH", keys.entry("*"), "COUNT", _SCAN))
        for names in _pages(found, _PER_SCRIPT):
            began = time.perf_counter()
            yield [name.decode() for name in names]
            await asyncio.sleep(time.perf_counter() - began)
        if cursor == b"0":
            return


async def _judge(link: Link, keys: PartitionKeys, names: list[str], how: list[str], tally: Tally) -> int:
    flat = await link.call(SCRIPTS["sweep"].call([keys.tags, *names], how))
    for at, epoch, labels in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        key = names[at - 1].removeprefix(keys.entry_prefix)
        tally.add(key, epoch_of(epoch.decode()), labels.decode(errors="replace").split("\n"))
    return len(flat) // 3


# L3. A condition is judged again by the DELETE, on the row as it is then: it may have been replaced by a newer one.
_OLDER = (
    "SELECT FROM unnest($2::text[], $3::bigint[], $4::bigint[]) m(label, ms, seq) "
    "WHERE (epoch_ms, epoch_seq) < (m.ms, m.seq)"
)
_TAGGED = f"tags && $2 AND EXISTS ({_OLDER} AND m.label = ANY(tags))"
_KEYED = (
    "key = ANY(ARRAY(SELECT decode(k, 'hex') FROM unnest($2::text[]) k)) "
    f"AND EXISTS ({_OLDER} AND decode(m.label, 'hex') = key)"
)
_BEGUN = f"EXISTS ({_OLDER} AND EXISTS (SELECT FROM unnest(tags || ''::text) t WHERE starts_with(t, m.label)))"


async def sweep_l3(
    pool: Pool, partition: int, marks: Iterable[tuple[str, Epoch]], tally: Tally, *, delete: bool = True
) -> int:
    """Delete from PostgreSQL the partition's answers that began before a mark of one of their labels.

    Returns how many; only counts them unless `delete`.

    Raises:
        one of `DATABASE_ERRORS`: some may be deleted already; sweep again.
    """
    return sum([await _sweep(pool, partition, where, page, tally, delete) for where, page in _conditions(marks)])


def _conditions(marks: Iterable[tuple[str, Epoch]]) -> list[tuple[str, Sequence[tuple[str, Epoch]]]]:
    """Sort marks by the condition that judges them, in pages of a bounded size."""
    by_condition: dict[str, list[tuple[str, Epoch]]] = {_KEYED: [], _TAGGED: [], _BEGUN: []}
    for label, at in marks:
        kind, _, rest = label.partition(":")
        if "\0" in label:
            continue  # PostgreSQL knows no such text
        if label == "all":
            by_condition[_BEGUN].append(("", at))
        elif kind == "prefix" and rest:
            by_condition[_BEGUN].append((rest, at))
        elif kind == "key":
            if _KEY.fullmatch(rest):
                by_condition[_KEYED].append((rest, at))
        else:
            by_condition[_TAGGED].append((label, at))
    return [(where, page) for where, found in by_condition.items() for page in _pages(found, _LABELS)]


async def _sweep(
    pool: Pool, partition: int, where: str, marks: Sequence[tuple[str, Epoch]], tally: Tally, delete: bool
) -> int:
    labels, epochs = [label for label, _ in marks], [at for _, at in marks]
    given: tuple[Any, ...] = (partition, labels, [ms for ms, _ in epochs], [seq for _, seq in epochs])
    hits, last = 0, b""
    columns = "key, epoch_ms, epoch_seq, tags"
    finding = f"SELECT {columns} FROM answers WHERE partition = $1 AND {where} AND key > $5 ORDER BY key LIMIT {_ROWS}"
    deleting = f"DELETE FROM answers WHERE partition = $1 AND key = ANY($5::bytea[]) AND {where} RETURNING {columns}"
    while True:
        found = await pool.fetch(finding, *given, last)
        for rows in _pages(found, _ROWS_AT_ONCE):
            if delete:
                rows = await pool.fetch(deleting, *given, sorted(row["key"] for row in rows))
            for row in rows:
                tally.add(row["key"].hex(), (row["epoch_ms"], row["epoch_seq"]), row["tags"])
            hits += len(rows)
        if len(found) < _ROWS:
            return hits
        last = found[-1]["key"]


def _pages(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


async def markers(link: Link, keys: PartitionKeys) -> dict[str, str]:
    """Return the partition's markers, label to id of its newest invalidation; prefixes as `prefix:P`."""
    found: dict[str, str] = {}
    cursor = b"0"
    while True:
        cursor, flat = await link.call(("HSCAN", keys.tags, cursor, "COUNT", _SCAN))
        for name, value in zip(flat[::2], flat[1::2], strict=True):
            if name == b"#prefixes":
                for line in value.decode(errors="replace").split("\n"):
                    entry_id, _, prefix = line.partition(" ")
                    found[_PREFIX + prefix] = entry_id
            elif not name.startswith(b"#"):
                found[name.decode(errors="replace")] = value.decode()
        if cursor == b"0":
            return found
