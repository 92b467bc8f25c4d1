"""What `millpond up` runs: the embedded servers and the workers, as child processes, until it is told to stop.

Nothing outlives it: children are stopped in order (workers hand back what they hold, then the server saves), killed
when they exceed the grace period, and on Linux die with it should it be killed itself.

Each thing that happens is one event, a dict with `event` and, where it concerns one, `component`:
`configured` (a server that runs elsewhere), `skipped` (one that is done without), `migrated`, `ready`, `running` (all
are ready), `error`, `exited` (with `restart_in` seconds), `stopping`, `killed`, `stopped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import migrations
from shared import console
from shared.errors import MillpondError, Unavailable
from shared.servers import EmbeddedServer, tethered
from shared.settings import Settings
from workers import stores
from workers.kinds import BACKGROUND, Kind
from workers.stores import Emit, Stores

FRONT_DOOR = Path(__file__).parent.parent / "millpond.py"
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
#: Seconds between looks for a configured database that did not answer at the start.
DATABASE_PAUSE = 2.0
#: A worker that ran this long (seconds) crashed for a new reason: its back-off begins anew.
STEADY = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    `concurrency` is per LLM worker; `background` one worker of each further kind; `grace` seconds to finish before
    SIGKILL.
    """

    lookup: int = 1
    llm: int = 1
    concurrency: int | None = None
    ephemeral: bool = False
    background: bool = True
    grace: float = 10.0


def run(settings: Settings, plan: Plan, emit: Emit) -> int:
    """Run everything until SIGINT, SIGTERM or SIGHUP; return the exit code.

    That is 0, or what its workers ended with when starting them again could not help: 2 when they refuse their
    settings, 3 when the configured server could not be reached before any worker was ready.

    Raises:
        ConfigError: no Redis can be started here, one runs on this data directory already, or the database is newer
            than this code.
        Unavailable: an embedded server did not come up.
    """
    began = time.monotonic()
    # From this thread, before any loop: a server dies with the thread that forked it.
    with stores.opened(settings, emit, ephemeral=plan.ephemeral) as opened:
        try:
            return asyncio.run(_Supervisor(settings, plan, emit, opened, began).run())
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # stopping has its own time limit


def describe_status(status: int) -> str:
    """Return an exit status in words: `status 3`, `killed by SIGKILL`."""
    if status >= 0:
        return f"status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


class _Supervisor:
    """The children of one `millpond up`."""

    def __init__(self, settings: Settings, plan: Plan, emit: Emit, opened: Stores, began: float) -> None:
        self._settings = settings
        self._plan = plan
        self._emit = emit
        self._stores = opened
        self._began = began
        numbers = {Kind.lookup: plan.lookup, Kind.llm: plan.llm}
        numbers |= dict.fromkeys(BACKGROUND if plan.background else (), 1)
        self._names = [
            f"{kind}-{number + 1}"
            for kind, most in numbers.items()
            for number in range(most)
            if opened.database_url is not None or not kind.needs_database
        ]
        self._migrated = asyncio.Event()
        if opened.migrated:
            self._migrated.set()
        self._awaited = {name for name in self._names if opened.migrated or not _kind(name).needs_database}
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._ready: set[str] = set()
        self._announced = False
        self._status = 0

    async def run(self) -> int:
        """Run until told to stop; return the exit code, see `run` of this module."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        workers = [asyncio.create_task(self._keep_worker(name)) for name in self._names]
        watches = [asyncio.create_task(self._keep_server(*named)) for named in self._stores.embedded.items()]
        watches.append(asyncio.create_task(self._await_database()))
        await self._stop.wait()
        for watch in watches:
            watch.cancel()
        self._emit({"event": "stopping"})
        await self._end(workers)
        await asyncio.gather(*watches, return_exceptions=True)
        return self._status

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()  # asked twice: no more waiting
        self._stop.set()

    async def _end(self, workers: list[asyncio.Task[None]]) -> None:
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        done: asyncio.Future[Any] = asyncio.gather(*workers)
        hurry: asyncio.Future[Any] = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((done, hurry), timeout=self._plan.grace, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        for name, process in self._running.items():
            self._emit({"event": "killed", "component": name})
            _signal(process, signal.SIGKILL)
        await done

    async def _keep_worker(self, name: str) -> None:
        backoff = FIRST_BACKOFF
        if _kind(name).needs_database:
            await self._migrated_or_stopped()
        while not self._stop.is_set():
            began = time.monotonic()
            status = await self._run_worker(name)
            self._running.pop(name, None)
            if self._stop.is_set():
                self._emit({"event": "stopped", "component": name, "status": status})
                return
            if status == console.CONFIG or (
                status == console.UNAVAILABLE and self._never_reached(name)
            ):  # it said why; trying again would not change it
                self._status = status
                self._stop.set()
                return
            backoff = FIRST_BACKOFF if time.monotonic() - began > STEADY else backoff
            said = {"status": status, "detail": describe_status(status), "restart_in": backoff}
            self._emit({"event": "exited", "component": name, **said})
            await self._pause(backoff)
            backoff = min(backoff * 2, LONGEST_BACKOFF)

    def _never_reached(self, name: str) -> bool:
        """Whether it speaks of a configured Redis that answered nobody yet; of PostgreSQL it may speak at any time."""
        return "redis" not in self._stores.embedded and not self._ready and not _kind(name).needs_database

    async def _run_worker(self, name: str) -> int:
        kind = _kind(name)
        arguments = [sys.executable, str(FRONT_DOOR), "worker", kind.value, "--json"]
        if kind is Kind.llm and self._plan.concurrency is not None:
            arguments += ["--concurrency", str(self._plan.concurrency)]
        process = await asyncio.create_subprocess_exec(
            *tethered(arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | self._stores.environment,
            start_new_session=True,  # a Ctrl-C reaches the supervisor alone, which stops them in order
        )
        self._running[name] = process
        if self._stop.is_set():
            _signal(process, signal.SIGTERM)
        assert process.stdout is not None  # noqa: S101 - it was asked for above
        async for line in process.stdout:
            self._hear(name, process.pid, line)
        return await process.wait()

    def _hear(self, name: str, pid: int, line: bytes) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            return
        if "error" in said:
            self._emit({"event": "error", "component": name, "detail": said["error"]["message"]})
        elif said.get("event") == "ready":
            detail = str(said["name"])
            if name.startswith("llm"):
                detail += f", provider {provider_in_force(self._settings)}"
            seconds = round(time.monotonic() - self._began, 3)
            self._emit({"event": "ready", "component": name, "pid": pid, "detail": detail, "seconds": seconds})
            self._ready.add(name)
            if not self._announced and self._ready >= self._awaited:
                self._announced = True
                self._emit({"event": "running", "seconds": seconds})

    async def _await_database(self) -> None:
        """Bring the schema up to date once a configured database that did not answer at the start does."""
        while not self._migrated.is_set() and self._stores.database_url is not None:
            await asyncio.sleep(DATABASE_PAUSE)
            try:
                applied = await migrations.migrate_async(self._stores.database_url)
            except Unavailable:
                continue
            except MillpondError as error:  # it answers, and trying again would not change what it says
                self._emit({"event": "error", "component": "postgres", "detail": error.message})
                self._status = console.exit_code(error)
                self._stop.set()
                return
            self._emit(stores.migrated(applied or migrations.KNOWN))
            self._migrated.set()

    async def _migrated_or_stopped(self) -> None:
        waiting = [asyncio.create_task(event.wait()) for event in (self._migrated, self._stop)]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()

    async def _keep_server(self, component: str, server: EmbeddedServer) -> None:
        backoff = FIRST_BACKOFF
        while True:
            await asyncio.sleep(0.2)
            status = server.poll()
            if status is None:
                continue
            detail = describe_status(status)
            self._emit({"event": "exited", "component": component, "detail": detail, "restart_in": backoff})
            await asyncio.sleep(backoff)
            began = time.monotonic()
            try:
                server.restart()
            except MillpondError as error:
                self._emit({"event": "error", "component": component, "detail": error.message})
                backoff = min(backoff * 2, LONGEST_BACKOFF)
            else:
                self._emit(stores.ready(server, began))
                backoff = FIRST_BACKOFF

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


def provider_in_force(settings: Settings) -> str:
    """Return the provider's name, and for the simulated one that it is and how to have a real one."""
    if settings.kind_of(settings.provider_name) == "simulated":
        name = settings.provider_recorded
        return f"{name}: answers are made up ({for_real_answers(name)} for real ones)"
    where = f" at {console.masked(settings.openai_base_url)}" if settings.openai_base_url else ""
    return settings.provider_name + where


def for_real_answers(recorded: str) -> str:
    """Return what to set to have real answers; the argument is what the simulated provider is recorded under."""
    if name := recorded.partition("/")[2]:
        return f"set providers.{name}.kind to openai"
    return "set OPENAI_API_KEY or MILLPOND_OPENAI_BASE_URL"


def _kind(name: str) -> Kind:
    return Kind(name.rpartition("-")[0])


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
