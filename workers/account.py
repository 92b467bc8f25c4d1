"""One line of the report: what a group of requests was answered by, what it cost and what that saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_DERIVED = (
    "hit_rate", "without_call_rate", "coalescing_factor", "requests_per_call", "without_cache", "saved_share",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """The account of one group of requests (a day, a model, …) or, named `total`, of all.

    `requests` are those answered: `hits` from a stored answer, `coalesced` by joining a computation, `computed` by one
    of their own. Tokens and dollars of `spent` are the provider calls'; of `saved` what the calls would have cost that
    nobody made. `overhead` is the part of `spent` that no request waited for (refreshes, warming). Dollars of
    `simulated_calls`, and of hits on what they answered, are what the model they stand in for would have cost.
    """

    name: str
    requests: int
    tiers: dict[str, int]
    hits: int
    coalesced: int
    computed: int
    calls: int
    failed_calls: int
    background_calls: int
    unpriced_calls: int
    simulated_calls: int
    spent_prompt_tokens: int
    spent_completion_tokens: int
    spent: float
    overhead: float
    saved_prompt_tokens: int
    saved_completion_tokens: int
    saved: float
    saved_coalesced: float
    saved_seconds: float
    p50_ms: float | None
    p95_ms: float | None
    #: the sum of the squares of the calls' dollars, for intervals
    squares: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of requests answered from a stored answer, 0 to 1."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def without_call_rate(self) -> float:
        """Share of requests answered without a computation of their own, 0 to 1: hits and coalesced."""
        return (self.hits + self.coalesced) / self.requests if self.requests else 0.0

    @property
    def coalescing_factor(self) -> float | None:
        """Requests that waited for a computation, per computation; None of none."""
        return (self.computed + self.coalesced) / self.computed if self.computed else None

    @property
    def requests_per_call(self) -> float | None:
        """Requests answered per provider call, failed and background calls included; None without a call."""
        return self.requests / self.calls if self.calls else None

    @property
    def without_cache(self) -> float:
        """Dollars that the same requests would have cost: the calls they made, and those they were spared."""
        return self.spent - self.overhead + self.saved

    @property
    def saved_share(self) -> float:
        """Share of that cost that was not spent, at most 1; refreshes and warming may make it negative."""
        return (self.without_cache - self.spent) / self.without_cache if self.without_cache else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, the derived ones too, as plain JSON types."""
        plain = asdict(self)
        del plain["squares"]
        return plain | {name: getattr(self, name) for name in _DERIVED}
