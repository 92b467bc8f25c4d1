"""Finer latency buckets: what was counted before stays under the upper bound it was counted under."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

_OLD = "ARRAY[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000, 'Infinity']::float8[]"
_NEW = """ARRAY[
    1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200, 250, 300, 400, 500, 600, 800,
    1000, 1200, 1500, 2000, 2500, 3000, 4000, 5000, 6000, 8000, 10000, 12000, 15000, 20000, 25000, 30000, 40000, 60000,
    'Infinity']::float8[]"""


def upgrade() -> None:
    """Convert what is there; persistence workers wait meanwhile."""
    op.execute("LOCK TABLE hits IN ACCESS EXCLUSIVE MODE")
    op.execute("ALTER TABLE hits DROP CONSTRAINT hits_histogram_check")
    op.execute(f"""
        UPDATE hits SET histogram = ARRAY(
            SELECT coalesce(n, 0)
            FROM unnest({_NEW}) WITH ORDINALITY AS fine (bound, at)
            LEFT JOIN unnest({_OLD}, histogram) AS coarse (bound, n) USING (bound) ORDER BY at
        )""")  # noqa: S608 the lists above
    op.execute("ALTER TABLE hits ADD CONSTRAINT hits_histogram_check CHECK (cardinality(histogram) = 46)")


def downgrade() -> None:
    """Forward only."""
    raise NotImplementedError("the schema only moves forward: restore a backup to go back")
