"""Workers as real processes, which a test may kill, freeze, thaw or ask to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shared.embedded import tethered

FRONT_DOOR = Path(__file__).parent.parent / "millpond.py"
READY_TIMEOUT = 30.0
#: Data directories no server can use, as functions of a directory in which `file` is a file.
UNUSABLE_DIRECTORIES: dict[str, Callable[[Path], Path]] = {
    "a file": lambda here: here / "file",
    "under a file": lambda here: here / "file" / "data",
    "a name of 300 characters": lambda here: here / ("x" * 300),
}


class Process:
    """A `millpond` command with `--json`, and the lines it printed so far.

    `overrides` are settings: `{"llm_lease": 0.5}` becomes `MILLPOND_LLM_LEASE=0.5`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        url: str | None,
        overrides: Mapping[str, Any] | None = None,
        *,
        cwd: Path | None = None,
    ) -> None:
        named = ({} if url is None else {"redis_url": url}) | dict(overrides or {})
        self._start([str(FRONT_DOOR), *arguments, "--json"], os.environ | variables(named), cwd)

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.errors = ""
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            tethered([sys.executable, *arguments], signal.SIGKILL),
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_lines, self._read_errors)]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def name(self) -> str:
        """The consumer name of a worker that is ready."""
        return str(self.wait_for("ready")["name"])

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait_for(self, event: str, *, timeout: float = READY_TIMEOUT, component: str | None = None) -> dict[str, Any]:
        """Return the first line of that event; fail when the process ends or the time passes before it comes."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for line in self.lines:
                    if line.get("event") == event and component in (None, line.get("component")):
                        return line
                if self._process.poll() is not None and not self._readers[0].is_alive():
                    raise AssertionError(f"ended with {self._process.returncode} before {event!r}: {self.report()}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"no {event!r} within {timeout} s: {self.report()}")
                self._changed.wait(0.02)

    def report(self) -> str:
        """Return all it printed, for a failing test to show."""
        return "\n".join([*map(str, self.lines), self.errors])

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def sigkill(self) -> int:
        """Kill it; return its status, -9."""
        self.send(signal.SIGKILL)
        return self.wait()

    def sigstop(self) -> None:
        """Freeze it and wait until it is frozen."""
        self.send(signal.SIGSTOP)
        self.await_stopped()

    def await_stopped(self, timeout: float = 20.0) -> None:
        """Wait until it is frozen, by us or by its own fault point."""
        deadline = time.monotonic() + timeout
        while _state(self.pid) not in "Tt":
            assert time.monotonic() < deadline, f"it did not freeze: {self.report()}"
            time.sleep(0.005)

    def sigcont(self) -> None:
        """Thaw it."""
        self.send(signal.SIGCONT)

    def terminate(self, timeout: float = 20.0) -> int:
        """Ask it to stop; return its status."""
        self.send(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout: float = 20.0) -> int:
        """Return its status once it ended."""
        status = self._process.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        return status

    def close(self) -> None:
        """Kill it if it still runs, and let its pipes go."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(json.loads(line) if line.startswith("{") else {"text": line.rstrip()})
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.errors += line


def variables(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as environment variables."""
    plain = {name: isinstance(value, str | Path) for name, value in settings.items()}
    return {f"MILLPOND_{n.upper()}": str(value) if plain[n] else json.dumps(value) for n, value in settings.items()}


def our_code_environment() -> dict[str, str]:
    """Return an environment in which another Python finds our packages."""
    return os.environ | {"PYTHONPATH": str(FRONT_DOOR.parent)}


def start_worker(
    kind: str,
    url: str,
    *,
    fault: str | None = None,
    ready: bool = True,
    cwd: Path | None = None,
    **overrides: Any,
) -> Process:
    """Start `millpond worker KIND` and wait until it reads. `fault` is `kill@POINT` or `stop@POINT`, `:N` the Nth time.

    End it with `close()`, or use it as a context manager.
    """
    process = Process(["worker", kind], url, overrides | ({"fault": fault} if fault else {}), cwd=cwd)
    try:
        if ready:
            process.wait_for("ready")
    except BaseException:
        process.close()
        raise
    return process


def _state(pid: int) -> str:
    """Return the process's state letter, as /proc has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
