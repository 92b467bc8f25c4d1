"""What was spent, what was saved and how fast answers came, from the history in PostgreSQL.

All sums are made by the database: what comes back is one row per line of the report. docs/savings.md defines each
figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import asyncpg
import orjson

from shared.errors import CODES, InvalidRequest
from shared.settings import Experiment
from shared.times import moment
from shared.touches import BOUNDS, TIERS
from workers.account import Line
from workers.comparison import Variant, compare
from workers.intervals import Ratio, percentile
from workers.report_sql import COMPUTED, HOURS_QUERY, NAMED, PROVIDERS_QUERY, TIERS_QUERY, TOP_QUERY, By, account

_HOUR = timedelta(hours=1)
#: Longest prompt shown beside a key.
_PROMPT = 200


@dataclass(frozen=True, slots=True)
class Window:
    """From `since` to before `until`, both on the hour (UTC): history is kept by the hour."""

    since: datetime
    until: datetime

    @classmethod
    def of(cls, since: str, until: str | None, now: datetime) -> Window:
        """Return the whole hours between two moments, each a span before now (`24h`, `7d`) or an ISO date.

        Raises:
            InvalidRequest: one is neither, or they are the wrong way round.
        """
        begin = moment(since, "since", now).replace(minute=0, second=0, microsecond=0)
        end = now if until is None else moment(until, "until", now)
        end = -((datetime.min.replace(tzinfo=UTC) - end) // _HOUR) * _HOUR + datetime.min.replace(tzinfo=UTC)
        if begin >= end:
            raise InvalidRequest(f"--since {since} is not before --until {until or 'now'}", field="since")
        return cls(begin, end)


@dataclass(frozen=True, slots=True)
class Tier:
    """Requests answered by one tier, their share of all, their latency, and what their hits saved.

    Latency counts from the request's entry in the stream to its answer; interpolated within a bucket.
    """

    tier: str
    requests: int
    share: float
    p50_ms: float | None
    p95_ms: float | None
    saved_prompt_tokens: int
    saved_completion_tokens: int
    saved: float


@dataclass(frozen=True, slots=True)
class TopKey:
    """An answer often asked for. `saved` is its hits times what its newest stored computation cost; None if unknown."""

    key: str
    hits: int
    profile: str | None
    tenant: str | None
    model: str | None
    saved: float | None
    prompt: str | None
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `millpond report` has to say. `groups` by dimension; `providers` counts calls by who answered."""

    window: Window
    first_hour: datetime | None
    total: Line
    tiers: list[Tier]
    groups: dict[str, list[Line]]
    variants: list[Variant]
    top: list[TopKey]
    providers: dict[str, int]

    @property
    def empty(self) -> bool:
        """Whether nothing happened in the window."""
        return not self.total.requests and not self.total.calls

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return {
            "since": self.window.since.isoformat(),
            "until": self.window.until.isoformat(),
            "history_since": self.first_hour and self.first_hour.isoformat(),
            "total": self.total.as_dict(),
            "tiers": [asdict(tier) for tier in self.tiers],
            "groups": {
                by: [line.as_dict() for line in lines] for by, lines in self.groups.items() if by != "experiment"
            },
            "experiments": [asdict(variant) for variant in self.variants],
            "top": [asdict(key) for key in self.top],
            "providers": self.providers,
        }


async def collect(
    connection: asyncpg.Connection,
    window: Window,
    by: Sequence[By],
    top: int,
    experiments: Mapping[str, Experiment] = MappingProxyType({}),
) -> Report:
    """Read a report, all of it from one snapshot.

    `groups` has one list of lines for each dimension of `by`: at most `top` profiles, tenants, models, tiers.
    `experiments` are the declared ones, whose first variants are the baselines.
    """
    between = window.since, window.until
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        (total,) = await connection.fetch(account("total"), *between, CODES, None)
        tiers = await connection.fetch(TIERS_QUERY, *between)
        groups = {
            one: await connection.fetch(account(one), *between, CODES, None if one in NAMED else top) for one in by
        }
        hours = await connection.fetch(HOURS_QUERY, *between) if "experiment" in by else []
        keys = await connection.fetch(TOP_QUERY, *between, top)
        providers = await connection.fetch(PROVIDERS_QUERY, *between)
        first = await connection.fetchval("SELECT min(hour) FROM hits")
    whole = _line(total)
    lines: dict[str, list[Line]] = {one: _ordered(one, [_line(row) for row in rows]) for one, rows in groups.items()}
    return Report(
        window=window,
        first_hour=first,
        total=whole,
        tiers=sorted((_tier(row, whole.requests) for row in tiers), key=lambda tier: _place(tier.tier)),
        groups=lines,
        variants=compare(
            lines.get("experiment", []),
            {name: list(experiment.variants) for name, experiment in experiments.items()},
            {row["name"]: _ratios(row) for row in hours},
        ),
        top=[_top_key(row) for row in keys],
        providers={row["provider"]: row["calls"] for row in providers},
    )


def _place(tier: str) -> tuple[int, str]:
    return (TIERS.index(tier) if tier in TIERS else len(TIERS), tier)


def _ordered(by: str, lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: _place(line.name)) if by == "tier" else lines


def _line(row: asyncpg.Record) -> Line:
    tiers = {tier: n for tier, n in zip(TIERS, row["tiers"], strict=False) if n}  # none served: an empty array
    coalesced, computed = (tiers.get(tier, 0) for tier in COMPUTED)
    hits = row["requests"] - coalesced - computed
    return Line(**_figures(row) | {"tiers": tiers, "hits": hits, "coalesced": coalesced, "computed": computed})


def _figures(row: asyncpg.Record) -> dict[str, Any]:
    """Return a row's columns, its histogram as percentiles."""
    figures = dict(row)
    histogram = figures.pop("histogram") or ()
    return figures | {f"p{q}_ms": percentile(histogram, BOUNDS, q / 100) for q in (50, 95)}


def _ratios(row: asyncpg.Record) -> tuple[Ratio, Ratio]:
    """Return a variant's hits and dollars per request."""
    return (
        Ratio(row["hours"], row["h"], row["n"], row["hh"], row["hn"], row["nn"]),
        Ratio(row["hours"], row["c"], row["n"], row["cc"], row["cn"], row["nn"]),
    )


def _tier(row: asyncpg.Record, requests: int) -> Tier:
    return Tier(**_figures(row), share=row["requests"] / requests if requests else 0.0)


def _top_key(row: asyncpg.Record) -> TopKey:
    prompt = None if row["prompt"] is None else asked(orjson.loads(row["prompt"]))
    return TopKey(**dict(row) | {"prompt": prompt})


def asked(body: Any) -> str | None:
    """Return what a request's body asks, on one line: its newest message of a user, or its input."""
    if not isinstance(body, dict):
        return None
    text: Any = body.get("input")
    messages = body.get("messages")
    if isinstance(messages, list):
        said = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
        text = said[-1] if said else None
    if isinstance(text, list):
        parts = [part.get("text", "") if isinstance(part, dict) else part for part in text]
        text = " ".join(part for part in parts if isinstance(part, str))
    if not isinstance(text, str) or not text.strip():
        return None
    plain = "".join(letter if letter.isprintable() else " " for letter in text[: 8 * _PROMPT])
    line = " ".join(plain.split())
    return line if len(line) <= _PROMPT else line[: _PROMPT - 1] + "…"
