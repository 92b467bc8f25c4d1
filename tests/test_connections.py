"""Every kind of URL reaches the server, with its password, its database and its certificate checked."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.link import LINK_ERRORS, Link

REDIS = shutil.which("redis-server")
OPENSSL = shutil.which("openssl")


@dataclass(frozen=True, slots=True)
class Guarded:
    """A server with a password on a TCP port, a TLS port and a unix socket."""

    port: int
    tls_port: int
    path: Path
    authority: Path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    if REDIS is None or OPENSSL is None:
        pytest.skip("needs Debian's redis-server (built with TLS) and openssl")
    home = tmp_path_factory.mktemp("guarded")
    key, certificate = home / "server.key", home / "server.crt"
    request = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*request, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = Guarded(_free_port(), _free_port(), home / "redis.sock", certificate)
    options = {
        "port": server.port, "bind": "127.0.0.1", "tls-port": server.tls_port, "tls-cert-file": certificate,
        "tls-key-file": key, "tls-auth-clients": "no", "unixsocket": server.path, "requirepass": "a secret",
        "dir": home, "save": "", "logfile": home / "log",
    }  # fmt: skip
    command = [REDIS, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    with subprocess.Popen(command) as process:
        until = time.monotonic() + 20
        while not server.path.exists():
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < until, "redis-server did not start"
            time.sleep(0.01)
        yield server
        process.terminate()


def urls(server: Guarded) -> dict[str, str]:
    return {
        "tcp": f"redis://:a%20secret@127.0.0.1:{server.port}/3",
        "unix": f"unix://:a%20secret@{server.path}?db=3",
        "tls": f"rediss://:a%20secret@localhost:{server.tls_port}/3?ssl_ca_certs={server.authority}",
        "named": f"redis://default:a%20secret@127.0.0.1:{server.port}/3",
    }


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls", "named"])
async def test_a_url_reaches_its_server_and_database(guarded: Guarded, kind: str) -> None:
    link = Link(urls(guarded)[kind], name="millpond-test")
    try:
        assert await link.call(("PING",)) == b"PONG"
        about = await link.call(("CLIENT", "INFO"))
        assert b" db=3 " in about
        assert b" name=millpond-test " in about
        big = b"x" * 300_000  # more than one TLS record, more than one read
        await link.send([("SET", "big", big), ("PEXPIRE", "big", 60_000)])
        assert await link.call(("GET", "big")) == big
    finally:
        await link.close()


async def test_a_certificate_nobody_vouches_for_is_refused(guarded: Guarded) -> None:
    link = Link(f"rediss://:a%20secret@localhost:{guarded.tls_port}/0")
    try:
        with pytest.raises(LINK_ERRORS, match="certificate verify failed"):
            await link.call(("PING",))
    finally:
        await link.close()


async def test_a_wrong_password_is_a_connection_error_without_the_password(guarded: Guarded) -> None:
    link = Link(f"redis://:guessed@127.0.0.1:{guarded.port}/0")
    try:
        with pytest.raises(LINK_ERRORS) as caught:
            await link.call(("PING",))
        assert "guessed" not in str(caught.value)
    finally:
        await link.close()
