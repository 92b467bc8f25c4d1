"""The command `millpond bench`."""

from __future__ import annotations

import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from producers.bench import machine, table
from producers.bench.measure import Show
from producers.bench.stage import Stage, surroundings
from shared.console import OTHER, print_json, reporting
from shared.errors import ConfigError, InvalidRequest
from shared.loop import run_fast
from shared.settings import load


class Which(StrEnum):
    """The benchmarks, and all of them."""

    hits = "hits"
    latency = "latency"
    miss = "miss"
    stampede = "stampede"
    failover = "failover"
    memory = "memory"
    promotion = "promotion"
    l3 = "l3"
    scenarios = "scenarios"
    all = "all"


#: The width of a table that goes into a file.
_PAPER = 120

ONES = tuple(which.value for which in Which if which is not Which.all)


def bench(
    which: Annotated[Which, typer.Argument(help="What to measure.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the whole report, every round of it, as JSON.")
    ] = None,
    configured: Annotated[
        bool,
        typer.Option(
            "--configured",
            help="Measure on the server that MILLPOND_REDIS_URL names, with workers of its own. Its database must be "
            "empty and is left empty. Without this no configured server is ever touched.",
        ),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For promotion: a real stream to play, a CSV file (.gz or not) with a column `key`, and `ts_s` "
            "(seconds) if it has times.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout; progress stays on stderr.")
    ] = False,
) -> None:
    """Measure what Millpond promises: each benchmark on a throwaway server of its own, in under a minute.

    Example: millpond bench hits --json

    hits: cached answers per second beside a plain GET and a bare stream echo. latency: one cached answer beside one
    GET. miss: what is added to a provider call. stampede: 10,000 identical requests at once. failover: the same with
    the computing worker killed. memory: 10,000 cached answers. promotion: Redis memory and hits on a heavy-tailed
    stream, with probation and without. l3: answers that only PostgreSQL has, among a million (made once, 2 GB in the
    user's cache directory). scenarios: the workloads this project began with, beside what was claimed for them.
    Speeds are medians of ratios taken in turns.

    Exit codes: 0 no figure is below its floor, 1 some figure is, 2 a wrong option or setting, 3 no server,
    130 interrupted.
    """
    with reporting(as_json):
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # leave as tidily as on Ctrl-C
        _check_out(out)
        options = _options(which, trace)
        url = _configured_url() if configured else None
        names = ONES if which is Which.all else (which.value,)
        report = measure(names, url, options)
        if out is not None:
            _write(report, out)
        results = report["benchmarks"]
        if as_json:
            print_json(report if which is Which.all else {"benchmark": which.value} | results[which.value])
        else:
            console = Console()
            if not console.is_terminal:
                console.width = _PAPER
            console.print(table.render(results, report["machine"]), highlight=False)
            if out is not None:
                console.print(f"Report: {out}", style="dim", highlight=False)
        if any(figure["verdict"] == table.MISSED for figure in report["figures"]):
            raise typer.Exit(OTHER)


def measure(names: tuple[str, ...], url: str | None, options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Run these benchmarks, each on a fresh stage (on the server at `url`, else on throwaway ones); return the report.

    `options` are further arguments of a benchmark's own `run`, by its name. Call it in the main thread.
    """
    results: dict[str, dict[str, Any]] = {}
    with _progress(len(names)) as show:
        for number, name in enumerate(names):
            busy = machine.busy()
            with surroundings(url) as stage:
                results[name] = run_fast(_one(name, stage, _within(show, number), options.get(name, {}))) | {
                    "cpu_busy_before": busy
                }
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": f"millpond bench {names[0] if len(names) == 1 else 'all'}",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "figures": [figure.as_dict() for figure in table.figures(results)],
        "benchmarks": results,
    }


async def _one(name: str, stage: Stage, show: Show, options: Mapping[str, Any]) -> dict[str, Any]:
    run: Callable[..., Awaitable[dict[str, Any]]] = import_module(f"producers.bench.{name}").run
    began = time.monotonic()
    found = await run(stage, show, **options)
    return found | {"seconds": round(time.monotonic() - began, 1), "server": await stage.about()}


def _within(show: Show, done: int) -> Show:
    return lambda what, fraction: show(what, done + fraction)


@contextmanager
def _progress(total: int) -> Iterator[Show]:
    """Show a bar on stderr. It is drawn when told to: a thread of its own would take time from what is measured."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("starting", total=total)

        def show(what: str, done: float) -> None:
            bar.update(task, description=f"{what:<36}", completed=done, refresh=True)

        yield show


def _options(which: Which, trace: Path | None) -> dict[str, dict[str, Any]]:
    """Return what a benchmark is told beyond the usual; find out before anything is measured that it makes no sense."""
    if trace is None:
        return {}
    if which is not Which.promotion:
        raise InvalidRequest("--trace is for `millpond bench promotion`", field="trace")
    from producers.bench.promotion import read_trace

    return {"promotion": {"trace": trace.name, "stream": read_trace(trace)}}


def _configured_url() -> str:
    url = load().redis_url
    if url is None:
        raise ConfigError(
            "--configured needs a server: set MILLPOND_REDIS_URL, or leave the option out for a throwaway one",
            field="redis_url",
        )
    return url.get_secret_value()


def _check_out(path: Path | None) -> None:
    """Find out before anything is measured that a report could not be written."""
    if path is None:
        return
    fresh = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if fresh:
            path.unlink()
    except OSError as problem:
        raise InvalidRequest(
            f"--out {path}: {problem.strerror}; name a file that can be written", field="out"
        ) from None


def _write(report: dict[str, Any], path: Path) -> None:
    path.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
