"""Experiments compared: each variant beside the first one of its experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workers.account import Line
from workers.intervals import Difference, Ratio, Sums, means, proportions, widened


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


def compare(
    lines: Sequence[Line], order: Mapping[str, Sequence[str]], ratios: Mapping[str, tuple[Ratio, Ratio]]
) -> list[Variant]:
    """Compare the variants that `lines` name as `EXPERIMENT LF VARIANT`.

    The baseline is the first variant in the experiment's declared `order`, else by name; one that nobody was given
    cannot be it. `ratios` by the same names, of hits and of dollars per request, widen the intervals.
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
        for variant in ranked:
            line = variants[variant]
            differences = (None, None) if base is None or line is base else _differences(base, line, ratios)
            found.append(_variant(experiment, variant, line, line is base, *differences))
    return found


def _differences(
    base: Line, line: Line, ratios: Mapping[str, tuple[Ratio, Ratio]]
) -> tuple[Difference | None, Difference | None]:
    rate = proportions((base.hits, base.requests), (line.hits, line.requests))
    cost = means(_costs(base), _costs(line))
    if base.name in ratios and line.name in ratios:
        (base_rate, base_cost), (line_rate, line_cost) = ratios[base.name], ratios[line.name]
        rate, cost = widened(rate, base_rate, line_rate), widened(cost, base_cost, line_cost)
    return rate, cost


def _variant(
    experiment: str, variant: str, line: Line, baseline: bool, rate: Difference | None, cost: Difference | None
) -> Variant:
    return Variant(
        experiment=experiment,
        variant=variant,
        baseline=baseline,
        requests=line.requests,
        calls=line.calls,
        hit_rate=line.hit_rate,
        cost_per_request=line.spent / line.requests if line.requests else 0.0,
        p50_ms=line.p50_ms,
        p95_ms=line.p95_ms,
        hit_rate_difference=rate,
        cost_difference=cost,
    )


def _costs(line: Line) -> Sums:
    return Sums(line.requests, line.spent, line.squares)
