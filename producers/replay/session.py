"""One replay from a plan to its report: read, schedule, run, count."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from producers.client import Client
from producers.replay import arrivals, report, workload
from producers.replay.record import Recorder
from producers.replay.report import Provider, Report, Setup
from producers.replay.run import Run
from shared import keys
from shared.embedded import resolve_url
from shared.errors import InvalidRequest
from shared.link import LINK_ERRORS, Link
from shared.messages import MAX_DEADLINE, label, seconds
from shared.settings import SIMULATED, Settings

#: Workers add up their counters once a second; after this many seconds those of the run are in.
COUNTED_AFTER = 1.5

Show = Callable[[Recorder, int], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to replay and how; the options of `millpond replay`. Times in seconds, `rate` per second."""

    file: Path
    arrivals: Path | None = None
    rate: float | None = None
    flat_out: bool = False
    speedup: float = 1.0
    concurrency: int | None = None
    repeat: str | None = None
    requests: int | None = None
    limit: int | None = None
    skip_bad: bool = False
    model: str | None = None
    profile: str | None = None
    tenant: str | None = None
    timeout: float | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Prepared:
    """Requests, when each is due (None: as fast as possible), and the words for it."""

    requests: list[workload.Request]
    schedule: list[float] | None
    arrivals: str
    skipped: int


def prepare(plan: Plan) -> Prepared:
    """Read the files of a plan and decide what is sent when.

    Raises:
        InvalidRequest: options that cannot work, or a file that cannot be replayed.
    """
    _check_options(plan)
    exponent = None if plan.repeat is None else workload.parse_repeat(plan.repeat)
    rng = random.Random(plan.seed)
    try:
        found = workload.read(plan.file, limit=plan.limit, skip_bad=plan.skip_bad)
        requests = found.requests
        count = plan.requests or len(requests)
        if exponent is not None:
            requests = workload.draw(requests, count, exponent, rng)
        elif plan.requests is not None:
            requests = workload.extend(requests, count)
        if plan.model is not None:
            requests = workload.with_model(requests, plan.model)
        times = arrivals.schedule(
            requests, trace=plan.arrivals, rate=plan.rate, flat_out=plan.flat_out, speedup=plan.speedup, rng=rng
        )
    except OSError as problem:
        raise InvalidRequest(
            f"{problem.filename or plan.file}: {problem.strerror}; give a file that can be read"
        ) from None
    if times is None and plan.speedup != 1.0:
        raise InvalidRequest(
            f"--speedup {plan.speedup:g} has no arrivals to speed up; give --rate or --arrivals, or leave it out",
            field="speedup",
        )
    return Prepared(requests, times, _describe(plan, open_loop=times is not None), found.skipped)


def _check_options(plan: Plan) -> None:
    """Refuse what would fail every request. Which profiles there are only the workers know."""
    if sum((plan.arrivals is not None, plan.rate is not None, plan.flat_out)) > 1:
        raise InvalidRequest("--arrivals, --rate and --flat-out exclude each other; give one", field="arrivals")
    if plan.flat_out and plan.speedup != 1.0:
        raise InvalidRequest("--flat-out and --speedup exclude each other; give one", field="speedup")
    for name, number in (("rate", plan.rate), ("speedup", plan.speedup)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise InvalidRequest(f"--{name} is {number:g}; give a finite number above 0, such as 2.5", field=name)
    for name, text in (("model", plan.model), ("profile", plan.profile), ("tenant", plan.tenant)):
        if text is not None:
            label(text, name)
    if plan.timeout is not None:
        seconds(plan.timeout, "timeout", least=0.001, most=MAX_DEADLINE)


def _describe(plan: Plan, *, open_loop: bool) -> str:
    if plan.arrivals is not None:
        words = f"arrivals of {plan.arrivals.name}"
    elif plan.rate is not None:
        words = f"Poisson arrivals at {plan.rate:g}/s"
    else:
        words = "arrivals from the file" if open_loop else "as fast as answered"
    if open_loop and plan.speedup != 1.0:
        words += f", {plan.speedup:g} times as fast"
    return f"{words}, repeats {plan.repeat}" if plan.repeat else words


async def replay(settings: Settings, plan: Plan, prepared: Prepared, show: Show) -> tuple[Recorder, Report]:
    """Run a prepared plan against the deployment of these settings; `show` displays it while it runs.

    Raises:
        ConfigError: there is no deployment to find.
        Unavailable: it does not answer.
    """
    url = resolve_url(settings)
    before = await counters(url)
    async with Client(url, settings=settings) as client:
        run = Run(
            client,
            prepared.requests,
            prepared.schedule,
            concurrency=plan.concurrency,
            profile=plan.profile,
            tenant=plan.tenant,
            timeout=plan.timeout,
        )
        async with show(run.recorder, len(prepared.requests)):
            recorder = await run.complete()
    setup = Setup(
        source=plan.file.name,
        arrivals=prepared.arrivals,
        latency_from="the scheduled arrival" if run.open_loop else "the moment of sending",
        concurrency=run.concurrency,
        speedup=plan.speedup,
        skipped_lines=prepared.skipped,
        interrupted=run.interrupted,
    )
    after = await _counters_later(url)
    return recorder, report.build(recorder, setup, _provider(settings, recorder, before, after), settings.prices)


async def counters(url: str) -> dict[str, int]:
    """Return the deployment's counters. Raises redis-py's connection errors."""
    link = Link(url, name="millpond-replay")
    try:
        flat = await link.call(("HGETALL", keys.STATS))
    finally:
        await link.close()
    return {name.decode(): int(value) for name, value in zip(flat[::2], flat[1::2], strict=True)}


async def _counters_later(url: str) -> dict[str, int] | None:
    await asyncio.sleep(COUNTED_AFTER)
    try:
        return await counters(url)
    except LINK_ERRORS:
        return None


def _provider(
    settings: Settings, recorder: Recorder, before: Mapping[str, int], after: Mapping[str, int] | None
) -> Provider:
    """Tell the provider by the answers it gave, or by the settings here when nothing was computed."""
    simulated = recorder.simulated > 0 if recorder.spent else bool(SIMULATED.match(settings.provider_recorded))
    name = "simulated" if simulated else "openai"
    if after is None:
        return Provider(name, simulated, None, None)
    calls, errors = (after.get(n, 0) - before.get(n, 0) for n in ("provider_calls", "provider_errors"))
    return Provider(name, simulated, calls, errors)
