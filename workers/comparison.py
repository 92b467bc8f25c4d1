"""Experiments compared: each variant beside the first one of its experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.account import Line
from workers.intervals import Difference, Sums, means, proportions


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant's figures, and their differences to the experiment's baseline (None for the baseline itself).

    `hit_rate` from 0 to 1, `cost_per_request` in dollars: the calls' dollars over all requests, hits included.
    """

    experiment: str
    variant: str
    baseline: bool
    requests: int
    calls: int
    hit_rate: float
    cost_per_request: float
    p50_ms: float | None
    p95_ms: float | None
    hit_rate_difference: Difference | None
    cost_difference: Difference | None


def compare(lines: Sequence[Line], order: Mapping[str, Sequence[str]]) -> list[Variant]:
    """Compare the variants that `lines` name as `EXPERIMENT LF VARIANT`.

    The baseline is the first variant in the experiment's declared `order`, else by name; one that nobody was given
    cannot be it.
    """
    found: list[Variant] = []
    experiments: dict[str, dict[str, Line]] = {}
    for line in lines:
        experiment, _, variant = line.name.partition("\n")
        experiments.setdefault(experiment, {})[variant] = line
    for experiment, variants in sorted(experiments.items()):
        place = {variant: at for at, variant in enumerate(order.get(experiment, ()))}
        ranked = sorted(variants, key=lambda variant: (place.get(variant, len(place)), variant))
        base = next((variants[variant] for variant in ranked if variant and variants[variant].requests), None)
        found += [_variant(experiment, variant, variants[variant], base) for variant in ranked]
    return found


def _variant(experiment: str, variant: str, line: Line, base: Line | None) -> Variant:
    compared = base is not None and line is not base
    return Variant(
        experiment=experiment,
        variant=variant,
        baseline=line is base,
        requests=line.requests,
        calls=line.calls,
        hit_rate=line.hit_rate,
        cost_per_request=line.spent / line.requests if line.requests else 0.0,
        p50_ms=line.p50_ms,
        p95_ms=line.p95_ms,
        hit_rate_difference=proportions(_share(base), _share(line)) if base is not None and compared else None,
        cost_difference=means(_costs(base), _costs(line)) if base is not None and compared else None,
    )


def _share(line: Line) -> tuple[int, int]:
    return line.hits, line.requests


def _costs(line: Line) -> Sums:
    return Sums(line.requests, line.spent, line.squares)
