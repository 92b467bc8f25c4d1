"""The account of a replay: who was answered by what, how fast, and what it cost and saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from producers.replay.record import COALESCED, LLM, Recorder, Usage, in_order
from shared import rounding
from shared.prices import cost
from shared.settings import Price

#: The tiers that a report names even when nothing came from them.
ALWAYS = ("l1", "l2", LLM)


@dataclass(frozen=True, slots=True)
class Way:
    """The answers that came by one way: how many, their share of all requests, their latency in milliseconds."""

    count: int
    share: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Money:
    """Tokens and dollars of some calls; `unpriced` of them used a model without a known price and count as 0."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    unpriced: int


@dataclass(frozen=True, slots=True)
class Setup:
    """How the replay was done. `concurrency` is the limit in force; latency counts from `latency_from`."""

    source: str
    arrivals: str
    latency_from: str
    concurrency: int
    speedup: float
    skipped_lines: int
    interrupted: bool


@dataclass(frozen=True, slots=True)
class Provider:
    """The provider behind the deployment and the calls that its workers counted during the run.

    `calls` counts those of every client of the deployment; None when the counters could not be read.
    """

    name: str
    simulated: bool
    calls: int | None
    errors: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a replay has to say. Shares are of all requests, from 0 to 1; times as their names say.

    `tiers` has at least `ALWAYS`; `errors` counts by code, `error_messages` gives the first message of each code.
    """

    run: Setup
    provider: Provider
    requests: int
    answered: int
    without_call: int
    without_call_share: float
    tiers: dict[str, Way]
    coalesced: Way
    errors: dict[str, int]
    error_messages: dict[str, str]
    wall_s: float
    answered_per_s: float
    driver_lag_p99_ms: float
    spent: Money
    saved: Money
    dollars_without_cache: float
    saved_share: float

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON types."""
        return asdict(self)


def percentile(ordered: Sequence[float], q: float) -> float:
    """Return the value that a share `q` of a sorted sequence does not exceed (nearest rank); 0 of nothing."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def build(
    recorder: Recorder, run: Setup, provider: Provider, prices: Mapping[str, Price] = MappingProxyType({})
) -> Report:
    """Add up a finished run, at list prices or the deployment's own (`prices`).

    Takes time in proportion to its requests (and sorts their latencies once).
    """
    total = len(recorder)
    by_way = recorder.latencies()
    named = in_order(list({*ALWAYS, *recorder.names} - {COALESCED}))
    tiers = {way: _way(by_way.get(way, []), total) for way in named}
    answered = total - sum(recorder.errors.values())
    without_call = answered - tiers[LLM].count
    spent, saved = _money(recorder.spent, prices), _money(recorder.saved, prices)
    without_cache = spent.dollars + saved.dollars
    return Report(
        run=run,
        provider=provider,
        requests=total,
        answered=answered,
        without_call=without_call,
        without_call_share=_share(without_call, total),
        tiers=tiers,
        coalesced=_way(by_way.get(COALESCED, []), total),
        errors=dict(sorted(recorder.errors.items())),
        error_messages=dict(sorted(recorder.messages.items())),
        wall_s=round(recorder.wall, 3),
        answered_per_s=_rate(answered, recorder.wall),
        driver_lag_p99_ms=_ms(percentile(sorted(recorder.lag), 0.99)),
        spent=spent,
        saved=saved,
        dollars_without_cache=rounding.dollars(without_cache),
        saved_share=_share(saved.dollars, without_cache),
    )


def _way(ordered: Sequence[float], total: int) -> Way:
    return Way(
        count=len(ordered),
        share=_share(len(ordered), total),
        p50_ms=_ms(percentile(ordered, 0.50)),
        p95_ms=_ms(percentile(ordered, 0.95)),
        p99_ms=_ms(percentile(ordered, 0.99)),
    )


def _money(calls: Counter[Usage], prices: Mapping[str, Price]) -> Money:
    dollars, unpriced = 0.0, 0
    for (model, prompt, completion), times in calls.items():
        price = cost(model, prompt, completion, prices)
        if price is None:
            unpriced += times
        else:
            dollars += price * times
    return Money(
        calls=calls.total(),
        prompt_tokens=sum(prompt * times for (_, prompt, _), times in calls.items()),
        completion_tokens=sum(completion * times for (_, _, completion), times in calls.items()),
        dollars=rounding.dollars(dollars),
        unpriced=unpriced,
    )


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0


def _rate(count: int, seconds: float) -> float:
    rate = count / seconds if seconds else 0.0
    return round(rate, 1 if rate >= 1 else 4)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
