"""Touches: how often what was answered, gathered in a worker and reported about once a second in one message.

`promotion` reads the hits per key, `persistence` the statistics. A report that is lost is lost: no hit waits for one.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson

from shared.entry import Entry
from shared.link import Command
from shared.messages import Kind

#: Upper bounds of the latency histogram's buckets, in milliseconds, each at most 1.5 times the one before from 2 on (a
#: percentile is as exact as its bucket); a last one has no bound.
BOUNDS = (
    1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200, 250, 300, 400, 500, 600, 800, 1000,
    1200, 1500, 2000, 2500, 3000, 4000, 5000, 6000, 8000, 10_000, 12_000, 15_000, 20_000, 25_000, 30_000, 40_000,
    60_000,
)  # fmt: skip
#: Every way a request is answered, in the order of reports; the last two joined a computation, and began one.
TIERS = ("l1", "l2", "l3", "semantic", "stale", "collapsed", "llm")
#: The tiers whose hits are reported per key, in this order.
KEYED = ("l1", "l2", "l3")
_PLACES = {tier: place for place, tier in enumerate(KEYED)}
_EVERY = 1.0
_MOST_SPOTS = 4000
#: What an answer took, so what each hit saved: tokens of prompt and completion, dollars, milliseconds.
_Saved = tuple[tuple[int, int], float | None, int]


@dataclass(slots=True)
class _Sum:
    hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    saved_ms: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))


class Touches:
    """What one consumer answered since its last report."""

    def __init__(self, stream: str, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._hits: defaultdict[tuple[str, Kind, str, int, _Saved], int] = defaultdict(int)
        self._sums: defaultdict[tuple[str, Kind], _Sum] = defaultdict(_Sum)
        self._due = 0.0

    def hit(self, tier: str, kind: Kind, entry: Entry, hits: int, latency_ms: int) -> None:
        """Count requests that an entry answered, what each saved, and that its key was hit."""
        # Only noted here, once per batch and entry; added up when it is reported.
        self._hits[tier, kind, entry.key, latency_ms, (entry.tokens, entry.cost, entry.compute_ms)] += hits

    def add(
        self,
        tier: str,
        kind: Kind,
        hits: int,
        latency_ms: int,
        tokens: tuple[int, int] = (0, 0),
        cost: float | None = None,
        saved_ms: int = 0,
    ) -> None:
        """Count `hits` requests answered by `tier` after `latency_ms`; each saved `tokens`, `cost` and `saved_ms`."""
        total = self._sums[tier, kind]
        total.hits += hits
        total.prompt_tokens += tokens[0] * hits
        total.completion_tokens += tokens[1] * hits
        total.cost += (cost or 0.0) * hits
        total.saved_ms += saved_ms * hits
        total.histogram[bisect_left(BOUNDS, latency_ms)] += hits

    def report(self, *, now: bool = False) -> list[Command]:
        """Return the command that reports what was counted, if there is anything and it is time; forget it."""
        moment = time.monotonic()
        due = now or moment >= self._due or len(self._hits) >= _MOST_SPOTS
        if not due or not (self._hits or self._sums):
            return []
        self._due = moment + _EVERY
        per_key: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(KEYED))
        for (tier, kind, key, latency_ms, saved), hits in self._hits.items():
            per_key[key][_PLACES[tier]] += hits
            self.add(tier, kind, hits, latency_ms, *saved)
        stats: list[list[Any]] = [
            [
                tier, kind.profile, kind.tenant, kind.model, kind.experiment, kind.variant, s.hits, s.prompt_tokens,
                s.completion_tokens, s.cost, s.saved_ms, s.histogram,
            ]
            for (tier, kind), s in self._sums.items()
        ]  # fmt: skip
        data = orjson.dumps({"keys": per_key, "stats": stats})
        self.clear()
        return [("XADD", self._stream, "NOMKSTREAM", "MAXLEN", "~", self._limit, "*", "data", data)]

    def clear(self) -> None:
        """Forget what was counted."""
        self._hits.clear()
        self._sums.clear()
