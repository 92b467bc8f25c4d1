"""Where a benchmark plays: a server, and the processes around it, all of which are gone when it ends.

A throwaway stage has an embedded server of its own, keeps nothing on disk and reads none of the caller's settings. A
configured one uses the server that MILLPOND_REDIS_URL names: only if that database is empty, and it leaves it empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess  # it runs this program's own workers
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrations import migrate_async
from shared import embedded, postgres
from shared.errors import ConfigError, Unavailable
from shared.link import Link
from shared.settings import Settings, load

ROOT = Path(__file__).parent.parent.parent
START_TIMEOUT = 30.0


class Child:
    """A process of ours that speaks one JSON object per line. It is killed with its stage, or with this process."""

    def __init__(self, name: str, argv: list[str], environment: dict[str, str], scratch: Path) -> None:
        self.name = name
        self._errors = scratch / f"{name}-{os.urandom(4).hex()}.log"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
                embedded.tethered([sys.executable, *argv], signal.SIGKILL),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=scratch,
                start_new_session=True,  # a Ctrl-C is for the benchmark, which then kills its children
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    async def hear(self, timeout: float = START_TIMEOUT) -> dict[str, Any]:
        """Return the next object it prints.

        Raises:
            Unavailable: it ended, or said nothing within `timeout` seconds.
        """
        assert self._process.stdout is not None  # noqa: S101 (it was asked for)
        try:
            line = await asyncio.wait_for(asyncio.to_thread(self._process.stdout.readline), timeout)
        except TimeoutError:
            self.kill()  # ends the thread that still reads
            raise Unavailable(f"{self.name} said nothing within {timeout:g} s{self._last_words()}") from None
        except asyncio.CancelledError:
            self.kill()
            raise
        if not line:
            raise Unavailable(f"{self.name} ended with status {self._process.wait()}{self._last_words()}")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise Unavailable(f"{self.name}: {said['error'].get('message', said['error'])}")
        return said

    def tell(self, word: str) -> None:
        """Write a line to it."""
        assert self._process.stdin is not None  # noqa: S101 (it was asked for)
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL it and wait until it is gone."""
        if self.alive:
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill it and let its pipes go."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._errors.read_text(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1]}" if lines else ""


class Stage:
    """A server with nothing on it, and the processes started beside it. `scratch` is a directory for files."""

    def __init__(self, url: str, scratch: Path, *, throwaway: bool) -> None:
        self.url = url
        self.scratch = scratch
        self.throwaway = throwaway
        self._children: list[Child] = []
        self._journals = 0
        self._postgres: postgres.EmbeddedPostgres | None = None

    def settings(self, **overrides: Any) -> Settings:
        """Return settings of a client on this stage."""
        return load(**({"redis_url": self.url, "partitions": 1} | overrides))

    def journal(self) -> Path:
        """Return a fresh file for a simulated provider to count its calls in."""
        self._journals += 1
        return self.scratch / f"calls-{self._journals}.jsonl"

    async def worker(self, kind: str, **overrides: Any) -> Child:
        """Start `millpond worker KIND` with these settings; return once it reads."""
        child = self._start(f"{kind} worker", [str(ROOT / "millpond.py"), "worker", kind, "--json"], overrides)
        await child.hear()
        return child

    async def database(self) -> str:
        """Return the URL of a throwaway PostgreSQL with our schema, started when first asked for.

        Raises:
            ConfigError: there is none to start.
            Unavailable: it did not come up.
        """
        if self._postgres is None:
            # From this thread, which lives as long as the stage: the server dies with it.
            self._postgres = postgres.start(self.scratch, ephemeral=True)
            await migrate_async(self._postgres.url)
        return self._postgres.url

    async def child(self, module: str, **parameters: Any) -> Child:
        """Start a module of this package with `parameters` as its JSON argument; return once it says it is ready."""
        argv = ["-m", f"producers.bench.{module}", json.dumps({"url": self.url} | parameters)]
        child = self._start(module, argv, {})
        await child.hear()
        return child

    def close(self) -> None:
        """Kill every process started here, and stop the database."""
        for child in self._children:
            child.close()
        self._children.clear()
        if self._postgres is not None:
            self._postgres.stop()

    async def wipe(self) -> None:
        """Delete everything on the server; it was empty when the stage was set."""
        link = Link(self.url, name="millpond-bench")
        try:
            await link.call(("FLUSHDB", "SYNC"))
        finally:
            await link.close()

    async def about(self) -> dict[str, Any]:
        """Return what kind of server this is: its name, version and allocator."""
        link = Link(self.url, name="millpond-bench")
        try:
            lines = (await link.call(("INFO",))).decode().splitlines()
        finally:
            await link.close()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        name = found.get("server_name", "redis")
        version = found.get("valkey_version") or found.get("redis_version", "unknown")
        return {
            "server": f"{name} {version}",
            "allocator": found.get("mem_allocator", "unknown"),
            "connection": self.url.split(":", 1)[0],
            "embedded": self.throwaway,
        }

    def _start(self, name: str, argv: list[str], overrides: dict[str, Any]) -> Child:
        environment = dict(os.environ)
        # Below every other entry, so that a child finds the same modules whatever directory this was started in.
        paths = [*filter(None, [environment.get("PYTHONPATH")]), str(ROOT)]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        given = {"redis_url": self.url, "partitions": 1, "provider": "simulated", "l3": "database_url" in overrides}
        given |= overrides
        for key, value in given.items():
            plain = isinstance(value, str | Path)
            environment[f"MILLPOND_{key.upper()}"] = str(value) if plain else json.dumps(value)
        child = Child(name, argv, environment, self.scratch)
        self._children.append(child)
        return child


@contextlib.contextmanager
def surroundings(url: str | None) -> Iterator[Stage]:
    """Set a stage: on the server at `url` (left empty at the end), or on a throwaway one. Call it in the main thread.

    Raises:
        ConfigError: the database at `url` is not empty, or there is no server to start.
        Unavailable: the server did not come up.
    """
    with (
        tempfile.TemporaryDirectory(prefix="millpond-bench-") as directory,
        _without_settings(Path(directory)),
        contextlib.ExitStack() as stack,
    ):
        scratch = Path(directory)
        if url is None:
            server = stack.enter_context(embedded.start(scratch, ephemeral=True))
            stage = Stage(server.url, scratch, throwaway=True)
        else:
            asyncio.run(_refuse_a_used_database(url))
            stage = Stage(url, scratch, throwaway=False)
        try:
            yield stage
        finally:
            stage.close()
            if url is not None:
                asyncio.run(stage.wipe())


async def _refuse_a_used_database(url: str) -> None:
    link = Link(url, name="millpond-bench")
    try:
        keys = await link.call(("DBSIZE",))
    finally:
        await link.close()
    if keys:
        raise ConfigError(
            f"the configured database holds {keys} keys and a benchmark wants an empty one, which it empties again: "
            "name another database in MILLPOND_REDIS_URL, or leave --configured out for a throwaway server",
            field="redis_url",
        )


@contextlib.contextmanager
def _without_settings(scratch: Path) -> Iterator[None]:
    """Hide the caller's settings: a figure must not depend on an `.env` that happens to lie about."""
    hidden = {name: value for name, value in os.environ.items() if name.upper().startswith("MILLPOND_")}
    before = Path.cwd()
    for name in hidden:
        del os.environ[name]
    os.chdir(scratch)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.update(hidden)
