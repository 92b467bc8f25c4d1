"""What `millpond up` runs: the embedded server and the workers, as child processes, until it is told to stop.

Nothing outlives it: children are stopped in order (workers hand back what they hold, then the server saves), killed
when they exceed the grace period, and on Linux die with it should it be killed itself.

Each thing that happens is one event, a dict with `event` and, where it concerns one, `component`:
`ready`, `running` (all are ready), `error`, `exited` (with `restart_in` seconds), `stopping`, `killed`, `stopped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import console, embedded
from shared.errors import MillpondError
from shared.settings import Settings

Emit = Callable[[dict[str, Any]], None]

FRONT_DOOR = Path(__file__).parent.parent / "millpond.py"
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
#: A worker that ran this long (seconds) crashed for a new reason: its back-off begins anew.
STEADY = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `concurrency` is per LLM worker; `grace` seconds to finish before SIGKILL."""

    lookup: int = 1
    llm: int = 1
    concurrency: int | None = None
    ephemeral: bool = False
    grace: float = 10.0


def run(settings: Settings, plan: Plan, emit: Emit) -> int:
    """Run everything until SIGINT, SIGTERM or SIGHUP; return the exit code.

    That is 0, or what its workers ended with when starting them again could not help: 2 when they refuse their
    settings, 3 when the configured server could not be reached before any worker was ready.

    Raises:
        ConfigError: no server can be started here, or one runs on this data directory already.
        Unavailable: the embedded server did not come up.
    """
    began = time.monotonic()
    if settings.redis_url is not None:
        url = settings.redis_url.get_secret_value()
        emit({"event": "configured", "component": "redis", "url": console.masked(url)})
        return asyncio.run(_Supervisor(settings, plan, emit, url, None, began).run())
    # Started from this thread, before any loop: the server dies with the thread that forked it.
    server = embedded.start(settings.data_dir, ephemeral=plan.ephemeral)
    try:
        emit(_server_ready(server, began))
        return asyncio.run(_Supervisor(settings, plan, emit, server.url, server, began).run())
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # stopping has its own time limit
        server.stop()
        emit({"event": "stopped", "component": "redis"})


def describe_status(status: int) -> str:
    """Return an exit status in words: `status 3`, `killed by SIGKILL`."""
    if status >= 0:
        return f"status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


def _server_ready(server: embedded.EmbeddedRedis, began: float) -> dict[str, Any]:
    kept = "nothing is kept" if server.ephemeral else f"data in {server.data}"
    return {
        "event": "ready",
        "component": "redis",
        "pid": server.pid,
        "url": server.url,
        "detail": f"embedded {server.binary.name}, {kept}",
        "seconds": round(time.monotonic() - began, 3),
    }


class _Supervisor:
    """The children of one `millpond up`."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        emit: Emit,
        url: str,
        server: embedded.EmbeddedRedis | None,
        began: float,
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._emit = emit
        self._url = url
        self._server = server
        self._began = began
        self._names = [f"lookup-{n + 1}" for n in range(plan.lookup)]
        self._names += [f"llm-{n + 1}" for n in range(plan.llm)]
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
        watch = asyncio.create_task(self._keep_server())
        await self._stop.wait()
        watch.cancel()
        self._emit({"event": "stopping"})
        await self._end(workers)
        await asyncio.gather(watch, return_exceptions=True)
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
        while not self._stop.is_set():
            began = time.monotonic()
            status = await self._run_worker(name)
            self._running.pop(name, None)
            if self._stop.is_set():
                self._emit({"event": "stopped", "component": name, "status": status})
                return
            never_reached = status == console.UNAVAILABLE and self._server is None and not self._ready
            if status == console.CONFIG or never_reached:  # it said why; trying again would not change it
                self._status = status
                self._stop.set()
                return
            backoff = FIRST_BACKOFF if time.monotonic() - began > STEADY else backoff
            said = {"status": status, "detail": describe_status(status), "restart_in": backoff}
            self._emit({"event": "exited", "component": name, **said})
            await self._pause(backoff)
            backoff = min(backoff * 2, LONGEST_BACKOFF)

    async def _run_worker(self, name: str) -> int:
        kind = name.rpartition("-")[0]
        arguments = [sys.executable, str(FRONT_DOOR), "worker", kind, "--json"]
        if kind == "llm" and self._plan.concurrency is not None:
            arguments += ["--concurrency", str(self._plan.concurrency)]
        process = await asyncio.create_subprocess_exec(
            *embedded.tethered(arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"MILLPOND_REDIS_URL": self._url},
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
            if not self._announced and len(self._ready) == len(self._names):
                self._announced = True
                self._emit({"event": "running", "seconds": seconds})

    async def _keep_server(self) -> None:
        backoff = FIRST_BACKOFF
        while self._server is not None:
            await asyncio.sleep(0.2)
            status = self._server.poll()
            if status is None:
                continue
            detail = describe_status(status)
            self._emit({"event": "exited", "component": "redis", "detail": detail, "restart_in": backoff})
            await asyncio.sleep(backoff)
            began = time.monotonic()
            try:
                self._server.restart()
            except MillpondError as error:
                self._emit({"event": "error", "component": "redis", "detail": error.message})
                backoff = min(backoff * 2, LONGEST_BACKOFF)
            else:
                self._emit(_server_ready(self._server, began))
                backoff = FIRST_BACKOFF

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


def provider_in_force(settings: Settings) -> str:
    """Return the provider's name, and for the simulated one that it is and how to have a real one."""
    if settings.provider_name == "simulated":
        return "simulated: answers are made up (set OPENAI_API_KEY or MILLPOND_OPENAI_BASE_URL for real ones)"
    where = f" at {console.masked(settings.openai_base_url)}" if settings.openai_base_url else ""
    return settings.provider_name + where


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
