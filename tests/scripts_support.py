"""The scripts as functions on a plain connection: what the tests of single scripts work with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson
import pytest
import redis

from shared.entry import pack
from shared.keys import PartitionKeys
from shared.scripts import SCRIPTS, Arg
from tests.conftest import Server

K = PartitionKeys(0)
KEY = "0" * 32
FOREVER = 1 << 45


class Scripts:
    """A plain connection, and the scripts as functions on it."""

    def __init__(self, connection: redis.Redis) -> None:
        self.redis: Any = connection
        for script in SCRIPTS.values():
            connection.script_load(script.source)
        self.run("XGROUP", "CREATE", K.requests, "lookup", "0", "MKSTREAM")
        self.run("XGROUP", "CREATE", K.fills, "llm", "0", "MKSTREAM")

    def run(self, *command: Any) -> Any:
        """Run a plain command."""
        return self.redis.execute_command(*command)

    def script(self, name: str, names: Sequence[str], *args: Arg) -> Any:
        """Run a script."""
        return self.redis.execute_command(*SCRIPTS[name].call(names, args))

    def request(self, request_id: str = "r", reader: str = "w", **fields: str) -> bytes:
        """Publish and read one request."""
        said = {"id": request_id, "reply": "c", "deadline": "0", "body": "{}"} | fields
        at: bytes = self.run("XADD", K.requests, "*", *(part for pair in said.items() for part in pair))
        self.run("XREADGROUP", "GROUP", "lookup", reader, "STREAMS", K.requests, ">")
        return at

    def join(self, *pairs: bytes | str, flight: str = "t", most: int = 9, until: int = FOREVER, **other: Any) -> Any:
        """Join with these (message id, waiter) pairs."""
        said: dict[str, Any] = {"mode": "default", "oldest": 0, "ttl": 60_000, "store": 1, "tags": "a"} | other
        names = [
            K.requests, K.fills, K.entry(KEY), K.flight(KEY), K.tags, K.waiters(KEY, ""), K.failed(KEY), K.refreshes,
        ]  # fmt: skip
        return self.script(
            "join", names, "lookup", "w", KEY, flight, said["mode"], said["oldest"], said["ttl"], said["store"],
            until, most, "{}", "{}", said["tags"], said.get("lease", 0), "llm", *pairs,
        )  # fmt: skip

    def fly(self, flight: str = "t", **other: Any) -> bytes:
        """Begin a flight and let worker `l` take its fill; return the fill's id."""
        self.join(self.request(), "c r", flight=flight, **other)
        read = self.run("XREADGROUP", "GROUP", "llm", "l", "STREAMS", K.fills, ">")
        at: bytes = read[0][1][-1][0]
        return at

    def land(
        self,
        fill: bytes,
        *,
        epoch: str = "0-0",
        flight: str = "t",
        verdict: str = "",
        body: bytes = b"{}",
        probation: int = 60_000,
    ) -> Any:
        """Land."""
        meta, packed = pack(body, model="m", compute_ms=1, compress_above=9999)
        names = [
            K.fills, K.entry(KEY), K.flight(KEY), K.waiters(KEY, flight), K.outcome(KEY, flight), K.tags, K.landed,
            K.invalidations, K.failed(KEY),
        ]  # fmt: skip
        return self.script(
            "land", names, "llm", "l", fill, KEY, flight, epoch, "a", 60_000, verdict, 60_000, meta, packed, 100,
            0, 0, probation, "{}", "", 100,
        )  # fmt: skip

    def fail(self, fill: bytes, *, flight: str = "t", negative_ms: int = 0, call: str = "{}") -> Any:
        """Fail."""
        names = [
            K.fills, K.flight(KEY), K.waiters(KEY, flight), K.outcome(KEY, flight), K.entry(KEY), K.tags,
            K.failed(KEY), K.landed,
        ]  # fmt: skip
        error = orjson.dumps({"code": "x"})
        return self.script("fail", names, "llm", "l", fill, flight, error, 60_000, KEY, negative_ms, "x", call, 9)

    def store(self, epoch: str, *tags: str, expires: int = FOREVER, created: int = 1) -> bytes:
        """Put an entry into L2 by hand."""
        meta, body = pack(b"{}", model="m", compute_ms=1, compress_above=9999)
        text = f"mp2 {epoch} {created} {expires - created} 0 0 {len(tags)}\n" + "".join(f"{tag}\n" for tag in tags)
        entry = text.encode() + meta + b"\n" + body
        self.run("SET", K.entry(KEY), entry, "PX", 60_000)
        return entry

    def waiters(self) -> list[bytes]:
        """Return who waits, without when each was published."""
        aboard = self.run("LRANGE", K.waiters(KEY, "t"), 0, -1)
        assert all(one.rpartition(b" ")[2].isdigit() for one in aboard)
        return [one.rpartition(b" ")[0] for one in aboard]

    def invalidate(self, *tags: str) -> str:
        """Invalidate."""
        at: bytes = self.script("invalidate", [K.invalidations, K.tags], "t", 100, *tags)
        return at.decode()


@pytest.fixture
def scripts(server: Server) -> Iterator[Scripts]:
    """The scripts, on the shared server."""
    with server.connect() as connection:
        yield Scripts(connection)
        connection.flushall()
