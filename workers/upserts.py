"""Rows into PostgreSQL: a statement per table and batch, each of which may be run again without doubling anything.

Each function runs within its caller's transaction. Rows go in in the order of their keys, so that two workers that
write the same ones wait for each other and never in a circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.records import (
    AnswerRow,
    CallRow,
    HitRow,
    Landed,
    Touched,
    experiment_rows,
    hit_rows,
    top_rows,
)

#: So many keys of a batch of reports enter `top_keys`, the most often hit ones. One hit is enough: where little is
#: asked, a batch rarely has two of a key.
_TOP_MOST = 1000

_ANSWER_TYPES = {
    "key": "bytea", "partition": "int", "epoch_ms": "bigint", "epoch_seq": "bigint", "created": "timestamptz",
    "fresh": "timestamptz", "expires": "timestamptz", "gone": "timestamptz", "tags": "text", "profile": "text",
    "tenant": "text", "model": "text", "provider": "text", "endpoint": "text", "prompt_tokens": "int",
    "completion_tokens": "int", "cost": "float8", "compute_ms": "int", "bytes": "int", "entry": "bytea",
    "prompt": "text",
}  # fmt: skip
_CALL_TYPES = {
    "at": "timestamptz", "partition": "int", "id": "text", "attempt": "int", "key": "bytea", "profile": "text",
    "tenant": "text", "model": "text", "provider": "text", "endpoint": "text", "kind": "text", "outcome": "text",
    "prompt_tokens": "int", "completion_tokens": "int", "cost": "float8", "duration_ms": "int", "experiment": "text",
    "variant": "text",
}  # fmt: skip
_HIT_TYPES = {
    "hour": "timestamptz", "tier": "text", "profile": "text", "tenant": "text", "model": "text", "experiment": "text",
    "variant": "text", "hits": "bigint", "prompt_tokens": "bigint", "completion_tokens": "bigint", "cost": "float8",
    "saved_ms": "bigint", "histogram": "text",
}  # fmt: skip
#: How a column is made of what is sent: arrays of arrays must be of one length, and these are not.
_MADE_OF = {
    "tags": r"string_to_array(tags, E'\n')",
    "prompt": "prompt::jsonb",
    "histogram": "histogram::bigint[]",
}


def _insert(table: str, types: dict[str, str], conflict: str) -> str:
    names = ", ".join(f'"{name}"' for name in types)
    values = ", ".join(_MADE_OF.get(name, f'"{name}"') for name in types)
    arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(types.values(), 1))
    # The names are this module's own.
    return f"INSERT INTO {table} ({names}) SELECT {values} FROM unnest({arrays}) AS given ({names}) {conflict}"  # noqa: S608


def _set(types: dict[str, str]) -> str:
    return ", ".join(f'"{name}" = excluded."{name}"' for name in types if name != "key")


_ANSWERS = _insert(
    "answers",
    _ANSWER_TYPES,
    f"ON CONFLICT (key) DO UPDATE SET {_set(_ANSWER_TYPES)} "
    "WHERE (excluded.epoch_ms, excluded.epoch_seq, excluded.created) "
    "> (answers.epoch_ms, answers.epoch_seq, answers.created)",
)
_CALLS = _insert("calls", _CALL_TYPES, "ON CONFLICT DO NOTHING")
_HITS = _insert(
    "hits",
    _HIT_TYPES,
    """ON CONFLICT (hour, tier, profile, tenant, model, experiment, variant) DO UPDATE SET
    hits = hits.hits + excluded.hits,
    prompt_tokens = hits.prompt_tokens + excluded.prompt_tokens,
    completion_tokens = hits.completion_tokens + excluded.completion_tokens,
    cost = hits.cost + excluded.cost,
    saved_ms = hits.saved_ms + excluded.saved_ms,
    histogram = ARRAY(
        SELECT coalesce(a, 0) + coalesce(b, 0)
        FROM unnest(hits.histogram, excluded.histogram) WITH ORDINALITY AS both_of (a, b, n) ORDER BY n
    )""",
)
_TOP_KEYS = _insert(
    "top_keys",
    {"hour": "timestamptz", "key": "bytea", "hits": "bigint"},
    "ON CONFLICT (hour, key) DO UPDATE SET hits = top_keys.hits + excluded.hits",
)
_EXPERIMENTS = _insert(
    "experiments",
    {"name": "text", "variant": "text", "first_seen": "timestamptz", "last_seen": "timestamptz"},
    """ON CONFLICT (name, variant) DO UPDATE SET
    first_seen = least(experiments.first_seen, excluded.first_seen),
    last_seen = greatest(experiments.last_seen, excluded.last_seen)
    WHERE excluded.first_seen < experiments.first_seen
       OR excluded.last_seen > experiments.last_seen + interval '1 minute'""",
)
_APPLIED = """INSERT INTO applied (at, stream, id) SELECT at, $1, id
    FROM unnest($2::timestamptz[], $3::text[]) AS given (at, id) ON CONFLICT DO NOTHING RETURNING id"""
#: The row is there to be locked: were it not, a pruning that sets the first floor could pass between look and commit.
_FLOOR_BORN = "INSERT INTO floors (partition, epoch_ms, epoch_seq) VALUES ($1, 0, 0) ON CONFLICT DO NOTHING"
_FLOOR = "SELECT epoch_ms, epoch_seq FROM floors WHERE partition = $1 FOR SHARE"


async def write_landed(connection: Any, partition: int, landed: Sequence[Landed]) -> int:
    """Upsert what landed; return how many answers there were to store.

    An answer never replaces one of a newer epoch (I7). One whose epoch lies below the partition's floor is dropped:
    the markers that could void it are gone. The floor is locked until the commit, so that a worker frozen before it
    cannot bring such an answer in behind a pruning.
    """
    newest: dict[bytes, AnswerRow] = {}
    for one in landed:
        row = one.answer
        if row is not None and (row.key not in newest or row.age > newest[row.key].age):
            newest[row.key] = row
    calls = sorted({(c.at, c.partition, c.id, c.attempt): c for one in landed for c in one.calls}.values())
    if newest:
        floor = await _floor(connection, partition)
        answers = [newest[key] for key in sorted(newest) if newest[key][2:4] >= floor]
        await _execute(connection, _ANSWERS, answers)
    await _execute(connection, _CALLS, calls)
    await _execute(connection, _EXPERIMENTS, experiment_rows((c.at, c.experiment, c.variant) for c in calls))
    return len(newest)


async def write_touches(connection: Any, stream: str, touched: Sequence[Touched]) -> int:
    """Add the hits that were not counted yet; return how many reports were new."""
    at, ids = [one.at for one in touched], [one.id.decode() for one in touched]
    new = {row["id"].encode() for row in await connection.fetch(_APPLIED, stream, at, ids)}
    fresh = [one for one in touched if one.id in new]
    rows = hit_rows(fresh)
    await _execute(connection, _HITS, rows)
    await _execute(connection, _TOP_KEYS, top_rows(fresh, most=_TOP_MOST))
    await _execute(connection, _EXPERIMENTS, experiment_rows((r.hour, r.experiment, r.variant) for r in rows))
    return len(fresh)


async def _floor(connection: Any, partition: int) -> tuple[int, int]:
    row = await connection.fetchrow(_FLOOR, partition)
    if row is None:
        await connection.execute(_FLOOR_BORN, partition)
        row = await connection.fetchrow(_FLOOR, partition)
    return row["epoch_ms"], row["epoch_seq"]


async def _execute(connection: Any, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
    if rows:
        await connection.execute(statement, *(list(column) for column in zip(*rows, strict=True)))


assert (*_ANSWER_TYPES,) == AnswerRow._fields  # noqa: S101 (the columns are sent by position)
assert (*_CALL_TYPES,) == CallRow._fields  # noqa: S101
assert (*_HIT_TYPES,) == HitRow._fields  # noqa: S101
