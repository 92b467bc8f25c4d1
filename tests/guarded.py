"""A server behind the users that deploy/ ships, rendered and started by its own script."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from shared.embedded import find_binary, tethered

DEPLOY = Path(__file__).parent.parent / "deploy"
ROLES = ("client", "application", "lookup", "llm", "background", "operator")
#: A user of the tests' own, who may do anything.
_WITNESS = "user witness on nopass ~* &* +@all"


class Guarded:
    """One such server. `url` of a role is what its processes are given."""

    def __init__(self, socket: Path, passwords: dict[str, str]) -> None:
        self.socket = socket
        self.passwords = passwords

    def url(self, role: str, password: str | None = None) -> str:
        """Return the URL of a role, with its password or another."""
        return f"unix://{role}:{quote(password or self.passwords[role], safe='')}@{self.socket}"

    def connect(self, role: str = "witness") -> Any:
        """Return a connection as that role; `witness` may do anything."""
        return redis.Redis.from_url(self.url(role, "any" if role in ("witness", "health") else None))

    def refused(self) -> list[str]:
        """Return what the users' rules refused so far, and forget it."""
        with self.connect() as witness:
            entries = witness.execute_command("ACL LOG", 128)
            witness.execute_command("ACL LOG", "RESET")
        said = [{_text(k): _text(v) for k, v in entry.items()} for entry in entries]
        # redis-py tells a server of its name if that is allowed, or known at all; it does without.
        return [
            f"{one['username']}: {one['object']} ({one['reason']})" for one in said if one["object"] != "client|setinfo"
        ]


def render(target: Path, *command: str, **passwords: str) -> subprocess.CompletedProcess[str]:
    """Run deploy/redis.sh to its end with that command instead of a server."""
    script = [str(DEPLOY / "redis.sh"), *command]
    return subprocess.run(
        ["sh", *script], env=environment(target, passwords), capture_output=True, text=True, check=False
    )


def environment(target: Path, passwords: dict[str, str]) -> dict[str, str]:
    """Return what deploy/redis.sh wants to know."""
    named = {f"REDIS_{role.upper()}_PASSWORD": password for role, password in passwords.items()}
    return {"PATH": os.environ["PATH"], "ACL_FILE": str(target)} | named


@contextmanager
def guarded(directory: Path, binary: Path | None = None, options: tuple[str, ...] = ()) -> Iterator[Guarded]:
    """Run a server with the users of deploy/users.acl, each with a password of its own."""
    passwords = {role: f"{role} #/?'\"$x" for role in ROLES}  # what a shell or a URL could stumble over
    witness = directory / "users.acl"
    socket = directory / "s"
    server = [str(binary or find_binary()), "--port", "0", "--unixsocket", str(socket), "--dir", str(directory)]
    done = render(witness, "true", **passwords)
    assert done.returncode == 0, done.stderr
    with witness.open("a") as file:
        file.write(_WITNESS + "\n")
    process = subprocess.Popen(
        tethered([*server, "--save", "", *options, "--aclfile", str(witness)]), stdout=subprocess.DEVNULL
    )
    try:
        made = Guarded(socket, passwords)
        await_up(process, partial(made.connect, "health"))
        yield made
    finally:
        process.terminate()
        process.wait(20)


def await_up(process: subprocess.Popen[bytes], connect: Callable[[], redis.Redis]) -> None:
    """Wait until the server of that process answers; fail when it ends, or does not in time."""
    deadline = time.monotonic() + 20
    while True:
        assert process.poll() is None, "the server did not start, or refused its users"
        try:
            with connect() as connection:
                assert connection.ping()
                return
        except redis.ConnectionError:
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.02)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
