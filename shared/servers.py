"""What the embedded servers have in common: a place under the data directory, a lock, a record, an end with ours.

For a server `NAME` the data directory holds

    LOCK.lock     held (flock) by the process that runs the server; a second one is refused
    LOCK.json     where the running server listens: `{"url", "pid", "socket"}`; how `find` finds it
    NAME/         its data and its log

The server dies with the process that started it (Linux), so no orphan keeps a data directory busy; one that
is left over all the same is stopped before the next starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess  # its whole purpose is to run a server binary
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self

from shared.errors import ConfigError, Unavailable

#: `sun_path` holds 104 bytes on macOS, 108 on Linux, with a closing NUL.
SOCKET_PATH_LIMIT = 100
START_TIMEOUT = 15.0
#: How long a server may take to read what it kept before it answers.
LOAD_TIMEOUT = 300.0
STOP_TIMEOUT = 15.0
_VARIABLES = {"Redis": "REDIS_URL", "PostgreSQL": "DATABASE_URL"}
#: PR_SET_PDEATHSIG outlives the exec; the parent may have died before it was set.
_TETHER = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, int(sys.argv[1])); "
    "os.getppid() == int(sys.argv[2]) or os._exit(1); os.execv(sys.argv[3], sys.argv[3:])"
)

#: What a ping of a server's socket found.
State = Literal["ready", "loading", "silent"]


def tethered(command: Sequence[str], end: signal.Signals = signal.SIGTERM) -> list[str]:
    """Return the command such that the kernel sends it `end` when its parent dies; unchanged off Linux.

    The process id stays the command's own. The parent is the *thread* that starts it: use one that lives as long as
    the child should. (A launcher, not a `preexec_fn`: running Python between fork and exec is unsafe with threads.)
    """
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(int(end)), str(os.getpid()), *command]


class EmbeddedServer(ABC):
    """One server process and its place on disk; a context manager that stops it.

    `url` is where it listens, `data` the directory of its data and log, `binary` what runs.
    """

    name: ClassVar[str]
    lock_name: ClassVar[str]
    socket_name: ClassVar[str]
    #: asks the server to save and end, whoever is connected
    end_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(
        self, data_dir: Path, *, ephemeral: bool, binary: Path, options: Mapping[str, str], die_with_caller: bool
    ) -> None:
        self.data_dir = data_dir
        self.ephemeral = ephemeral
        self.binary = binary
        self._options = dict(options)
        self._tethered = die_with_caller
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: list[Path] = []
        self.socket = data_dir / self.name / self.socket_name
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(data_dir, self.lock_name)
        except OSError as error:
            raise ConfigError(
                f"cannot keep data in {data_dir} ({error.strerror}): set MILLPOND_DATA_DIR to a directory that can be "
                "written, or use --ephemeral with one",
                field="data_dir",
            ) from None
        try:
            self._stop_left_over()
            self.data = self._temporary() if ephemeral else data_dir / self.name
            self.data.mkdir(mode=0o700, exist_ok=True)
            self.data.chmod(0o700)
            self.socket = self._socket_path()
            self.url = self._url()
            self._prepare()
            self._launch()
        except BaseException:
            self.kill()
            self._clean()
            raise

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            Unavailable: it does not run.
        """
        if self._process is None:
            raise Unavailable("the embedded server is stopped; call restart() first")
        return self._process.pid

    def poll(self) -> int | None:
        """Return None while the server runs, its exit status (negative: the signal) once it ended."""
        return self._process.poll() if self._process is not None else 0

    def stop(self) -> None:
        """Stop the server with its data on disk, give up the data directory. Safe to call twice."""
        self._end(self.end_signal)
        self._clean()

    def kill(self) -> None:
        """SIGKILL the server at once and keep the data directory; for tests, `restart` follows."""
        self._end(signal.SIGKILL)

    def restart(self, *, wipe: bool = False) -> None:
        """Start again at the same URL on the same data (`wipe`: on none), stopping what still runs first."""
        self._end(self.end_signal)
        if wipe:
            shutil.rmtree(self.data, ignore_errors=True)
            self.data.mkdir(mode=0o700)
        self._prepare()
        self._launch()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def _url(self) -> str: ...

    @abstractmethod
    def _arguments(self) -> list[str]: ...

    @staticmethod
    @abstractmethod
    def _ping(socket: Path) -> State: ...

    def _disguise(self) -> list[str]:
        """The command that makes the server another user's; it comes before the tether, which such a change cuts."""
        return []

    def _prepare(self) -> None:
        """Make `data` ready for a start; nothing to do for a server that makes its own files."""

    @property
    def _logs(self) -> tuple[Path, ...]:
        """The files that may hold its last words, the most telling last."""
        return (self._output,)

    @property
    def _output(self) -> Path:
        return self.data / "output.log"

    def _telling(self, lines: list[str]) -> str:
        return lines[-1]

    def _launch(self) -> None:
        self.socket.unlink(missing_ok=True)
        arguments = self._arguments()
        with self._output.open("wb") as sink:
            self._process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
                [*self._disguise(), *(tethered(arguments, self.end_signal) if self._tethered else arguments)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # a Ctrl-C is for the supervisor, which stops the server last
            )
        self._await_ready()
        _write_record(self.data_dir, self.lock_name, self.url, self._process.pid, self.socket)

    def _await_ready(self) -> None:
        began = time.monotonic()
        while True:
            state = self._ping(self.socket)
            if state == "ready":
                return
            if (status := self.poll()) is not None:
                raise Unavailable(f"{self.binary.name} ended with status {status} at start: {self._last_words()}")
            waited = time.monotonic() - began
            if waited > (LOAD_TIMEOUT if state == "loading" else START_TIMEOUT):
                raise Unavailable(f"{self.binary.name} gave no answer in {waited:.0f} s: {self._last_words()}")
            time.sleep(0.005)

    def _last_words(self) -> str:
        lines = [
            line.strip()
            for log in self._logs
            if log.exists()
            for line in log.read_text(errors="replace").splitlines()
            if line.strip()
        ]
        return (self._telling(lines) if lines else "it left no message") + f" (whole log: {self._logs[-1]})"

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)  # a test may have stopped it
            signal_and_wait(process, how)
        self.socket.unlink(missing_ok=True)

    def _clean(self) -> None:
        if self._lock < 0:
            return
        (self.data_dir / f"{self.lock_name}.json").unlink(missing_ok=True)
        for path in self._scratch:
            shutil.rmtree(path, ignore_errors=True)
        os.close(self._lock)  # gives up the flock; the file stays, unlinking it would race with the next
        self._lock = -1

    def _stop_left_over(self) -> None:
        """Stop a server whose starter was killed where the kernel does not do it; the caller holds the lock."""
        record = read_record(self.data_dir, self.lock_name)
        if record and self._ping(Path(record["socket"])) != "silent":  # it is our socket: the pid is no stranger's
            pid = int(record["pid"])
            deadline = time.monotonic() + STOP_TIMEOUT
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self.end_signal)
                while time.monotonic() < deadline:
                    os.kill(pid, 0)
                    time.sleep(0.02)
                os.kill(pid, signal.SIGKILL)
        (self.data_dir / f"{self.lock_name}.json").unlink(missing_ok=True)

    def _socket_path(self) -> Path:
        usual = self.data / self.socket_name
        if len(os.fsencode(usual.absolute())) <= SOCKET_PATH_LIMIT:
            return usual.absolute()
        return self._temporary() / self.socket_name

    def _temporary(self) -> Path:
        path = Path(tempfile.mkdtemp(prefix="millpond-"))
        if len(os.fsencode(path / self.socket_name)) > SOCKET_PATH_LIMIT:
            path.rmdir()
            path = Path(tempfile.mkdtemp(prefix="millpond-", dir="/tmp"))
        self._scratch.append(path)
        return path


def find(data_dir: Path, lock_name: str, ping: Callable[[Path], State]) -> str | None:
    """Return the URL of the server that runs on `data_dir` under this lock, or None when none answers."""
    record = read_record(data_dir, lock_name)
    return record["url"] if record and ping(Path(record["socket"])) != "silent" else None


def missing(what: str, data_dir: Path, lock_name: str) -> str:
    """Return what to tell whoever needs the server that `find` did not find."""
    if read_record(data_dir, lock_name) is None:
        return f"no {what}: run `millpond up` in another terminal, or set MILLPOND_{_VARIABLES[what]}"
    return (
        f"the {what} of {data_dir} does not answer: if `millpond up` still runs there, try again in a moment (it "
        "starts again what ended); if not, run it"
    )


def read_record(data_dir: Path, lock_name: str) -> dict[str, str] | None:
    """Return what the server that was started last wrote of itself, or None; it may have ended since."""
    try:
        record = json.loads((data_dir / f"{lock_name}.json").read_bytes())
        return {"url": str(record["url"]), "pid": str(int(record["pid"])), "socket": str(record["socket"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def signal_and_wait(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Send the signal and reap the process, by SIGKILL if it takes longer than `STOP_TIMEOUT`."""
    process.send_signal(how)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def first_executable(names: Iterable[str]) -> Path | None:
    """Return the first of these programs that is on PATH."""
    return next((Path(found) for name in names if (found := shutil.which(name))), None)


def _write_record(data_dir: Path, lock_name: str, url: str, pid: int, socket: Path) -> None:
    fresh = data_dir / f"{lock_name}.json.new"
    fresh.write_text(json.dumps({"url": url, "pid": pid, "socket": str(socket)}))
    fresh.replace(data_dir / f"{lock_name}.json")


def _lock(data_dir: Path, lock_name: str) -> int:
    descriptor = os.open(data_dir / f"{lock_name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"another `millpond up` runs on {data_dir}: use it (`millpond ask` finds it), stop it first, or "
            "set MILLPOND_DATA_DIR to another directory",
            field="data_dir",
        ) from None
    return descriptor
