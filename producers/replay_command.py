"""The commands `millpond replay` and `millpond demo`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from producers.replay import make_demo, plot, progress, session, table, throwaway
from producers.replay.record import Recorder
from producers.replay.report import Report
from shared.console import INTERRUPTED, OTHER, print_json, reporting
from shared.loop import run_fast
from shared.settings import load

DEMO_REQUESTS = 2000
DEMO_PLOT = Path("out/demo.png")
FEWEST = 100

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; the live bar stays on stderr.")]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw hit rate and latency over time: .png, .svg or .pdf."),
]


def replay(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSONL (a prompt, an OpenAI body or batch line per line), CSV with a column `key` or `prompt`, "
            "or .txt; each may be gzipped."
        ),
    ],
    arrivals: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Send as a trace arrived: CSV with a column `ts_s`, seconds; may be .gz."),
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Poisson arrivals, requests per second.")] = None,
    flat_out: Annotated[
        bool, typer.Option("--flat-out", help="Ignore the file's own arrival times; send as fast as answered.")
    ] = False,
    speedup: Annotated[float, typer.Option(min=0.001, help="Play arrivals this many times as fast.")] = 1.0,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests on their way at once: 100 flat out, 20000 with arrivals, unless given."),
    ] = None,
    repeat: Annotated[
        str | None,
        typer.Option(metavar="zipf:S", help="Draw from the file's requests with Zipf popularity, such as zipf:1.1."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many to send: to draw, or going through the file again.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first N requests of the file.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count unreadable lines and go on.")] = False,
    model: Annotated[str | None, typer.Option(help="Put every request to this model, whatever it names.")] = None,
    profile: Annotated[str | None, typer.Option(help="Cache profile of requests that name none.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant of requests that name none.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Deadline of each request, seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --rate and --repeat.")] = 1,
    plot_file: PlotFile = None,
    as_json: Json = False,
) -> None:
    """Send a file of requests to the running deployment and account for every answer, token and dollar.

    Example: millpond replay prompts.jsonl.gz --repeat zipf:1.1 --rate 200 --requests 5000 --plot out/replay.png

    With arrivals (of the file, --arrivals or --rate) requests are sent when due whether or not earlier ones are
    answered, and latency counts from when they were due.

    Exit codes: 0 every request answered, 1 some were not, 2 wrong option, file or setting, 3 Redis unavailable,
    130 interrupted (with the report so far). A plot that could not be written after all is 1, below the report.
    """
    with reporting(as_json):
        _check_plot(plot_file)
        settings = load()
        plan = session.Plan(
            file=file,
            arrivals=arrivals,
            rate=rate,
            flat_out=flat_out,
            speedup=speedup,
            concurrency=concurrency,
            repeat=repeat,
            requests=requests,
            limit=limit,
            skip_bad=skip_bad,
            model=model,
            profile=profile,
            tenant=tenant,
            timeout=timeout,
            seed=seed,
        )
        prepared = session.prepare(plan)
        recorder, report = run_fast(session.replay(settings, plan, prepared, progress.shown))
        _finish(recorder, report, plot_file, as_json)


def demo(
    requests: Annotated[
        int, typer.Option(min=FEWEST, help="How many requests; another number than 2000 is written afresh.")
    ] = DEMO_REQUESTS,
    speedup: Annotated[float, typer.Option(min=0.001, help="Play the arrivals this many times as fast.")] = 1.0,
    plot_file: PlotFile = DEMO_PLOT,
    as_json: Json = False,
) -> None:
    """Show it all on this machine: a throwaway server, all workers, two thousand questions, the report, the plot.

    Example: millpond demo --plot out/demo.png

    The provider is simulated and no key is needed. Nothing is left running and no deployment of yours is touched.

    Exit codes: as `millpond replay`.
    """
    terminal = Console(stderr=True)

    def heard(event: dict[str, Any]) -> None:
        if event.get("event") == "ready":
            detail = str(event.get("detail", "")).partition(" (")[0]
            terminal.print(f"  {event['component']} ready, {detail}", style="dim", highlight=False)

    with reporting(as_json), tempfile.TemporaryDirectory(prefix="millpond-demo-") as scratch:
        _check_plot(plot_file)
        workload = _demo_workload(requests, Path(scratch))
        plan = session.Plan(file=workload, speedup=speedup)
        prepared = session.prepare(plan)
        with throwaway.deployment(heard, MILLPOND_PROVIDER="simulated", MILLPOND_CONCURRENCY="256") as url:
            settings = load(redis_url=url, provider="simulated")
            recorder, report = run_fast(session.replay(settings, plan, prepared, progress.shown))
        _finish(recorder, report, plot_file, as_json)


def _demo_workload(requests: int, scratch: Path) -> Path:
    if requests == DEMO_REQUESTS:
        return make_demo.WORKLOAD
    fresh = scratch / make_demo.WORKLOAD.name
    make_demo.write(fresh, requests)
    return fresh


def _check_plot(path: Path | None) -> None:
    if path is not None:
        plot.check(path)


def _finish(recorder: Recorder, report: Report, plot_file: Path | None, as_json: bool) -> None:
    """Print the report whatever becomes of the plot, and leave with the exit code of the run."""
    out = Console()
    if not as_json:
        out.print()
        out.print(table.render(report), highlight=False)
    wanted = plot_file if len(recorder) else None
    problem = None if wanted is None else _draw(recorder, report, wanted)
    drawn = wanted if problem is None else None
    if as_json:
        print_json(report.as_dict() | {"plot": None if drawn is None else str(drawn), "plot_error": problem})
    elif drawn is not None:
        out.print(f"Plot: {drawn}", style="dim", highlight=False)
    if problem is not None:
        sys.stderr.write(f"millpond: {problem}\n")
    if report.run.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.errors or problem is not None:
        raise typer.Exit(OTHER)


def _draw(recorder: Recorder, report: Report, path: Path) -> str | None:
    """Draw the plot; return what is wrong, with what to do, if it could not be written."""
    try:
        plot.draw(recorder, report, path)
    except OSError as problem:
        return plot.unwritable(path, problem)
    return None
