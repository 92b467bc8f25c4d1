"""Every order in which two who ask, an invalidation and the end of a lease can meet, against the scripts themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from shared.keys import PartitionKeys
from shared.scripts import SCRIPTS
from tests.conftest import Server

K = "0123456789abcdef0123456789abcdef"
TAG = "doc:1"
NAMES = PartitionKeys(0)
LEASE_MS = 60_000
FAR_MS = 4_000_000_000_000


def orders(rows: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Yield every interleaving of rows of steps; each row keeps its own order."""
    if not any(rows):
        yield []
    for at, row in enumerate(rows):
        if row:
            for rest in orders([*rows[:at], row[1:], *rows[at + 1 :]]):
                yield [row[0], *rest]


@dataclass
class Asker:
    """One who asks: what it was granted, and what became of it."""

    name: str
    token: str | None = None
    epoch: str = "0-0"
    lease_end_ms: int = 0
    #: its lease ran out before it landed
    lapsed: bool = False
    overtaken: bool = False
    aboard: str | None = None
    hit: bool = False
    landed: str | None = None
    told: list[bytes] = field(default_factory=list)


class Race:
    """One order, run against a real server; `what` happened so far is the model."""

    def __init__(self, connection: Any, end: str) -> None:
        self.run = connection.execute_command
        self.end = end
        self.askers = {"a": Asker("a"), "b": Asker("b")}
        self.holder: Asker | None = None
        self.entry_valid = False
        connection.flushdb()
        self.run("XGROUP", "CREATE", NAMES.requests, "lookup", "0", "MKSTREAM")
        self.invalidate("genesis")

    def call(self, script: str, names: Sequence[str], args: Sequence[Any]) -> Any:
        """Run one script."""
        return self.run(*SCRIPTS[script].call(names, args))

    def step(self, name: str) -> None:
        """Do one step: a1, b1 ask; a2, b2 land or fail; x ends the lease in force; i invalidates."""
        if name == "i":
            self.invalidate(TAG)
            self.entry_valid = False
            if self.holder is not None:
                self.holder.overtaken = True
        elif name == "x":
            self.expire()
        elif name.endswith("1"):
            self.ask(self.askers[name[0]])
        elif self.askers[name[0]].token is not None:
            self.settle(self.askers[name[0]])

    def invalidate(self, tag: str) -> None:
        """Invalidate a tag."""
        self.call("invalidate", [NAMES.invalidations, NAMES.tags], ["test", 1000, tag])

    def expire(self) -> None:
        """Let the lease in force run out."""
        if self.holder is not None:
            self.run("DEL", NAMES.flight(K))
            self.holder.lapsed, self.holder.lease_end_ms = True, 1
            self.holder = None

    def ask(self, who: Asker) -> None:
        """Publish, read and join, as a lookup worker does for `get_or_compute`."""
        self.run("XADD", NAMES.requests, "*", "id", who.name)
        ((_, ((message, _),)),) = self.run("XREADGROUP", "GROUP", "lookup", "w", "STREAMS", NAMES.requests, ">")
        k, message = NAMES, message.decode() if isinstance(message, bytes) else message
        reply = self.call(
            "join",
            [k.requests, k.fills, k.entry(K), k.flight(K), k.tags, k.waiters(K, ""), k.failed(K), k.refreshes],
            [
                "lookup", "w", K, f"token-{who.name}", "default", 0, LEASE_MS, 1, FAR_MS, 10, "{}", "{}", TAG,
                LEASE_MS, "llm", message, f"client-{who.name} r",
            ],
        )  # fmt: skip
        status = reply[0].decode()
        assert (status == "HIT") == self.entry_valid, "a valid entry answers, a void one never (I3)"
        who.hit = status == "HIT"
        if status == "LEAD":
            assert self.holder is None or self.holder.overtaken, "two live flights (I1)"
            who.token, who.epoch = reply[1].decode(), reply[4].decode()
            who.lease_end_ms = self.call("lead_renew", [k.flight(K)], [who.token, LEASE_MS, 0]) + LEASE_MS
            self.holder = who
        elif status == "JOINED":
            assert self.holder is not None and not self.holder.overtaken
            who.aboard = reply[1].decode()
            assert who.aboard == self.holder.token

    def settle(self, who: Asker) -> None:
        """Land, or fail, as whoever leads."""
        k, token = NAMES, str(who.token)
        flight = [k.flight(K), k.waiters(K, token), k.outcome(K, token)]
        if self.end == "fail":
            args = [token, 1000, who.lease_end_ms, K, 1]
            reply = self.call("lead_fail", [*flight, k.entry(K), k.tags], args)
            assert reply == self.call("lead_fail", [*flight, k.entry(K), k.tags], args), "said again, it is the same"
        else:
            args = [
                K, token, who.epoch, LEASE_MS, 0, 0, LEASE_MS, "{}", who.name, 1000, 10, 1000, TAG, who.lease_end_ms,
            ]  # fmt: skip
            reply = self.call("lead_land", [k.entry(K), *flight, k.tags, k.landed, k.invalidations], args)
            again = self.call("lead_land", [k.entry(K), *flight, k.tags, k.landed, k.invalidations], args)
            assert again == reply, "said again, it is the same"
        who.landed = reply[0].decode()
        assert (who.landed == "LOST") == who.lapsed, "who lapsed writes nothing, who did not is heard (I6)"
        if who.lapsed:
            return
        who.told = reply[2]
        if self.end == "land":
            replaced = self.holder is not who
            assert who.landed == ("overtaken" if replaced else "invalidated" if who.overtaken else "stored")
            self.entry_valid = self.entry_valid or who.landed == "stored"
        if self.holder is who:
            self.holder = None

    def check(self) -> None:
        """Whoever is aboard is among those told; a void entry is never read."""
        for who in self.askers.values():
            leader = next((one for one in self.askers.values() if one.token == who.aboard), None)
            if who.aboard and leader is not None and leader.landed not in (None, "LOST"):
                assert any(line.startswith(f"client-{who.name} r 1".encode()) for line in leader.told), "untold (I2)"
        _, found = self.call("fetch", [NAMES.tags, NAMES.entry(K)], [K, TAG])
        assert isinstance(found, bytes) == self.entry_valid


@pytest.mark.parametrize("end", ["land", "fail"])
def test_every_order_of_two_leaders_an_invalidation_and_a_lost_lease_holds(server: Server, end: str) -> None:
    count = 0
    with server.connect() as connection:
        for script in SCRIPTS.values():
            connection.script_load(script.source)
        for order in orders([["a1", "a2"], ["b1", "b2"], ["x"], ["i"]]):
            race = Race(connection, end)
            try:
                for step in order:
                    race.step(step)
                race.check()
            except AssertionError as error:
                raise AssertionError(f"{' '.join(order)}: {error}") from error
            count += 1
        connection.flushdb()
    assert count == 180
