"""The audit of invalidations in PostgreSQL: who, what, when, why, and how many answers were deleted for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncpg import Pool

from workers.sweep import Epoch, LogEntry, epoch_of

_REMEMBERED = 1000
#: A run that was repeated adds what it found still there: the sum is what was deleted in all.
_WRITE = """
INSERT INTO invalidations AS i (partition, id, at, by, reason, labels, dry_run, l2, l3)
SELECT $1, id, to_timestamp(ms / 1000.0), by, nullif(reason, ''), string_to_array(labels, E'\\n'), dry_run, l2, l3
FROM unnest($2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::bool[], $8::bigint[], $9::bigint[])
    AS new(id, ms, by, reason, labels, dry_run, l2, l3)
ON CONFLICT (partition, id) DO UPDATE SET
    l2 = EXCLUDED.l2 + CASE WHEN i.dry_run THEN 0 ELSE i.l2 END,
    l3 = EXCLUDED.l3 + CASE WHEN i.dry_run THEN 0 ELSE i.l3 END
RETURNING id, l2, l3
"""
_READ = "SELECT id, labels FROM invalidations WHERE partition = $1 AND NOT dry_run ORDER BY at DESC LIMIT $2"


@dataclass(slots=True)
class Owed:
    """An entry of the log in hand, and what was deleted for it so far."""

    entry: LogEntry
    swept_l2: bool = False
    l2: int = 0
    l3: int = 0
    #: what the audit counts already: it is not counted again when the telling has to be repeated
    known: int = 0

    @property
    def deleted(self) -> int:
        """How many answers this worker has deleted for it."""
        return self.known + self.l2 + self.l3

    def audited(self) -> None:
        """Remember that the audit has it. An inquiry's count is no sum: it stays."""
        if not self.entry.inquiry:
            self.known, self.l2, self.l3 = self.deleted, 0, 0


async def write(pool: Pool, partition: int, owed: Sequence[Owed]) -> dict[str, tuple[int, int]]:
    """Add to the audit, each count once; return by id what was deleted in all, from L2 and from L3.

    Raises:
        one of `DATABASE_ERRORS`.
    """
    entries = [one.entry for one in owed]
    rows = await pool.fetch(
        _WRITE,
        partition,
        [e.id for e in entries],
        [epoch_of(e.id)[0] for e in entries],
        [e.by for e in entries],
        [e.reason for e in entries],
        ["\n".join(e.labels) for e in entries],
        [e.inquiry for e in entries],
        [one.l2 for one in owed],
        [one.l3 for one in owed],
    )
    for one in owed:
        one.audited()
    return {row["id"]: (row["l2"], row["l3"]) for row in rows}


async def remembered(pool: Pool, partition: int) -> list[tuple[str, Epoch]]:
    """Return the newest labels invalidated, with when: Redis may have lost its markers, in a flush say.

    Raises:
        one of `DATABASE_ERRORS`.
    """
    rows = await pool.fetch(_READ, partition, _REMEMBERED)
    return [(label, epoch_of(row["id"])) for row in rows for label in row["labels"]]
