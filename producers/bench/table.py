"""What is promised, what was measured, and the verdict; as figures and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

AIM, FLOOR, MISSED = "aim met", "floor met", "below the floor"
_COLOURS = {AIM: "bold green", FLOOR: "yellow", MISSED: "bold red"}
_BUSY = 0.1


@dataclass(frozen=True, slots=True)
class Promise:
    """One figure that is promised: at least, or at most (`less`), the floor; better still the aim."""

    what: str
    benchmark: str
    field: str
    floor: float
    aim: float
    less: bool = True
    unit: str = ""
    spread: str = ""

    def verdict(self, measured: float) -> str:
        """Return which of the two the measured figure keeps."""
        for bound, word in ((self.aim, AIM), (self.floor, FLOOR)):
            if measured <= bound if self.less else measured >= bound:
                return word
        return MISSED


PROMISES = (
    Promise(
        "cached answers/s, 1 lookup worker, 1 producer: ratio to GET",
        "hits", "ratio_to_get", 0.6, 1.0, less=False, spread="ratio_to_get_range",
    ),
    Promise(
        "the same: ratio to a bare stream echo",
        "hits", "ratio_to_echo", 0.7, 0.9, less=False, spread="ratio_to_echo_range",
    ),
    Promise("cached p50, one at a time: ratio to GET", "latency", "ratio", 6, 4, spread="ratio_range"),
    Promise(
        "added by a miss to the provider's time, p50", "miss", "added_p50_ms", 3, 1, unit="ms", spread="added_p50_range"
    ),
    Promise("stampede: provider calls", "stampede", "provider_calls", 1, 1),
    Promise("stampede: requests unanswered", "stampede", "unanswered", 0, 0),
    Promise("failover (leader SIGKILLed): provider calls", "failover", "provider_calls", 2, 2),
    Promise("failover: requests unanswered", "failover", "unanswered", 0, 0),
    Promise("Redis memory of 10,000 answers of 5 KB text", "promotion", "answers_mb", 100, 20, unit="MB"),
    Promise("Redis memory per answer of 2 KB text", "memory", "redis_bytes_per_answer", 2047, 1023, unit="B"),
    Promise("answered by PostgreSQL, among 1,000,000: p95", "l3", "hit_p95_ms", 20, 3, unit="ms"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """A promise and how it was kept. `least` and `most` are the extremes of the rounds, where there are rounds."""

    what: str
    benchmark: str
    field: str
    floor: float
    aim: float
    unit: str
    measured: float
    least: float | None
    most: float | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


def figures(results: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Return the promised figures of the benchmarks that were run."""
    found = []
    for promise in PROMISES:
        if promise.benchmark in results:
            result = results[promise.benchmark]
            spread = result.get(promise.spread, {})
            measured = result[promise.field]
            bounds = (promise.floor, promise.aim, promise.unit, measured, spread.get("min"), spread.get("max"))
            found.append(
                Figure(promise.what, promise.benchmark, promise.field, *bounds, promise.verdict(measured)),
            )
    for claim in results.get("scenarios", {}).get("claims", ()):
        if claim["due"]:
            what, bound = f"{claim['scenario']}: {claim['what']}", claim["claim"]
            figures_of = ("scenarios", claim["field"], bound, bound, claim["unit"], claim["measured"], None, None)
            found.append(Figure(what, *figures_of, AIM if claim["kept"] else MISSED))
    return found


def render(results: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any]) -> RenderableType:
    """Return the table of promises; with a single benchmark, also everything else it found."""
    parts: list[RenderableType] = []
    if promised := [figure for figure in figures(results) if figure.benchmark != "scenarios"]:
        parts.append(_promises(promised))
    if "scenarios" in results:
        parts.append(_claims(results["scenarios"]["claims"]))
    if len(results) == 1:
        (result,) = results.values()
        parts += [_details(result)]
    parts.append(Text(_described(machine, results), style="dim"))
    busy = max(result["cpu_busy_before"] for result in results.values())
    if busy > _BUSY:
        warning = f"Other programs kept the processors {busy:.0%} busy just before: figures of speed suffer from it."
        parts.append(Text(warning, style="yellow"))
    return Group(*parts)


def _promises(found: list[Figure]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", max_width=60)
    for name in ("floor", "aim", "measured", "min - max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for one in found:
        extremes = "" if one.least is None or one.most is None else f"{_number(one.least)} - {_number(one.most)}"
        table.add_row(
            one.what,
            *(_with_unit(value, one.unit) for value in (one.floor, one.aim, one.measured)),
            extremes,
            Text(one.verdict, style=_COLOURS[one.verdict]),
        )
    return table


def _claims(claims: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("scenario", max_width=24)
    table.add_column("what", max_width=44)
    for name in ("claim", "measured", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    before = ""
    for one in claims:
        sign = "≤" if one["less"] else "≥"
        kept = Text("kept", style=_COLOURS[AIM])
        missed = Text("not kept", style=_COLOURS[MISSED]) if one["due"] else Text("needs the semantic tier")
        table.add_row(
            one["scenario"] if one["scenario"] != before else "",
            one["what"],
            f"{sign} {_with_unit(one['claim'], one['unit'])}",
            _with_unit(one["measured"], one["unit"]),
            f"{one['ratio']:.2f}",
            kept if one["kept"] else missed,
        )
        before = one["scenario"]
    return table


def _details(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in result.items():
        if isinstance(value, int | float | str):
            table.add_row(name, _number(value) if isinstance(value, int | float) else value)
        elif isinstance(value, dict) and value.keys() == {"median", "min", "max"}:
            table.add_row(name, f"{_number(value['median'])}  ({_number(value['min'])} - {_number(value['max'])})")
        elif isinstance(value, dict) and all(isinstance(part, int | float) for part in value.values()):
            table.add_row(name, ", ".join(f"{part} {_number(number)}" for part, number in value.items()))
    return table


def _described(machine: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> str:
    servers = {f"{r['server']['server']} over {r['server']['connection']}" for r in results.values()}
    cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
    return f"{machine['cpu']}, {cores}, Python {machine['python']}; {', '.join(sorted(servers))}"


def _with_unit(value: float, unit: str) -> str:
    return f"{_number(value)} {unit}".strip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"
