"""One cache key in a partition of its own, its history, and what must be true of them after every step.

What the scripts return is held against a plain history: when each flight began and how it ended, what was invalidated
when, who asked when. Logical time is the number of steps taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from shared import keys
from shared.entry import unpack
from shared.keys import PartitionKeys
from shared.link import Link
from shared.outbox import Outbox
from shared.scripts import Arg, Script
from tests.history import DUMP, ERROR, Ask, Flight, must


class Ledger:
    """The partition, its history, and the looks that hold one against the other."""

    def __init__(self, link: Link, partition: int, scripts: Mapping[str, Script]) -> None:
        self.link = link
        self.k = PartitionKeys(partition)
        self.key = f"{partition:032x}"
        self.client = f"client{partition}"
        self.scripts = scripts
        self.step = 0
        self.unread = 0
        self.owner: dict[bytes, str] = {}
        self.requests: dict[bytes, str] = {}
        self.flights: dict[str, Flight] = {}
        self.current = ""
        self.entry = ""
        self.landed: list[str] = []
        self.asked: dict[str, Ask] = {}
        self.invalidated: list[tuple[int, set[str]]] = []
        self.seen: list[Any] = []
        self.wrote_nothing = False

    # history

    def overtaken(self, flight: Flight, labels: set[str], by: int | None = None) -> bool:
        """Whether anything of these labels was invalidated after the flight began (and not after step `by`)."""
        concerned = labels | {"all", f"key:{self.key}"}
        return any(at > flight.began and (by is None or at <= by) and tags & concerned for at, tags in self.invalidated)

    def fit_entry(self, labels: set[str]) -> bool:
        """Whether what is stored may answer a request with these labels."""
        flight = self.flights.get(self.entry)
        return flight is not None and not self.overtaken(flight, flight.tags | labels)

    def serve(self, ask: Ask, flight: Flight) -> None:
        """Note that this flight's outcome is what the request is to be told."""
        must(
            not self.overtaken(flight, flight.tags | set(ask.tags), by=ask.published),
            f"I3: {ask.id} gets {flight.token}, which began before an invalidation that {ask.id} came after",
        )
        ask.aboard = flight.token

    # talking to the server

    def call(self, name: str, names: list[str], args: list[Arg]) -> tuple[Arg, ...]:
        """Return the command that runs a script."""
        return self.scripts[name].call(names, args)

    async def send(self, outbox: Outbox, not_after_ms: int) -> list[Any]:
        """Send replies with this world's own `reply` script."""
        commands = outbox.take(not_after_ms)
        return await self.link.send([(c[0], self.scripts["reply"].sha, *c[2:]) for c in commands])

    async def begin(self) -> None:
        """Create what a deployment has before the first request."""
        k = self.k
        await self.link.send(
            [
                ("XGROUP", "CREATE", k.requests, keys.LOOKUP_GROUP, "0", "MKSTREAM"),
                ("XGROUP", "CREATE", k.fills, keys.LLM_GROUP, "0", "MKSTREAM"),
                ("XGROUP", "CREATE", k.refreshes, keys.LLM_GROUP, "0", "MKSTREAM"),
                ("XGROUP", "CREATE", k.landed, "persistence", "0", "MKSTREAM"),
                ("XADD", keys.reply(self.client), "*", "", ""),
                self.call("invalidate", [k.invalidations, k.tags], ["genesis", 1000]),
            ]
        )

    async def look(self) -> None:
        """Take in everything there is, and hold it against history."""
        k, tokens = self.k, list(self.flights)
        names = [
            k.requests,
            k.fills,
            k.refreshes,
            k.landed,
            k.invalidations,
            k.tags,
            k.entry(self.key),
            k.flight(self.key),
        ]
        names += [name for t in tokens for name in (k.waiters(self.key, t), k.outcome(self.key, t))]
        names.append(keys.reply(self.client))
        dump = await self.link.call(("EVAL", DUMP, len(names), *names))
        if self.wrote_nothing:
            must(dump == self.seen, "I6: a worker without the lease wrote something")
            self.wrote_nothing = False
        self.seen = dump
        held = {row[0].decode(): row[3] for row in dump}
        stored = held.get(k.entry(self.key))
        if stored is not None:
            must(self.answer_of(stored) == self.entry, "I7: the stored answer changed without landing")
        said = [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in held[k.landed]]
        told = [self.answer_of(fields[b"entry"]) for fields in said if b"entry" in fields]
        must(told == self.landed, "`landed` differs from what was stored")
        ends = [one[b"outcome"].decode().replace(ERROR.code, "failed") for one in said]
        must(sorted(ends) == sorted(f.ended for f in self.flights.values() if f.ended), "a call was not told, or twice")
        live = held.get(k.flight(self.key))
        if live is not None:
            token = dict(zip(live[::2], live[1::2], strict=True))[b"token"].decode()
            must(not self.flights[token].ended, "a flight that has ended can still be joined")

    def answer_of(self, entry: bytes) -> str:
        """Return which flight computed an entry."""
        return str(orjson.loads(unpack(self.key, entry).tail.join([b"{", b""]))["body"]["answer"])

    # the end

    async def settle(self) -> None:
        """Hold against history what everyone was told; nothing may be left."""
        await self.look()
        held = {row[0].decode(): row for row in self.seen}
        for name in (self.k.requests, self.k.fills, self.k.refreshes):
            must(not held[name][3] and not held[name][4], f"I8: something is left in {name}")
        stays = {self.k.requests, self.k.fills, self.k.refreshes, self.k.landed, self.k.invalidations, self.k.tags}
        stays |= {self.k.entry(self.key), keys.reply(self.client)}
        must(set(held) <= stays, f"left over: {set(held) - stays}")
        told: dict[str, list[dict[str, Any]]] = {name: [] for name in self.asked}
        for _, fields in held[keys.reply(self.client)][3]:
            for ids, payload in zip(fields[::2], fields[1::2], strict=True):
                for request_id in ids.decode().split():
                    told[request_id].append(orjson.loads(payload))
        for ask in self.asked.values():
            must(told[ask.id], f"I2: {ask.id} was never told")
            for reply in told[ask.id]:
                self._told_right(ask, reply)

    def _told_right(self, ask: Ask, reply: dict[str, Any]) -> None:
        flight = self.flights[ask.aboard]
        if flight.ended == "failed" and flight.spare and ask.mode != "refresh":
            must(reply.get("degraded") is True, f"{ask.id} was told {reply} instead of what is kept for errors")
            must(reply["body"] == {"answer": flight.spare}, f"{ask.id} was told {reply}, not {flight.spare}")
            return
        if flight.ended == "failed":
            must(reply == {"error": ERROR.to_wire()}, f"I5: {ask.id} was not told its flight's own error: {reply}")
            return
        must(reply.get("body") == {"answer": flight.token}, f"{ask.id} was told {reply} instead of {flight.token}")
        if reply["tier"] == "llm":
            must(reply["stored"] == flight.ended, f"{ask.id} was told {reply['stored']}, not {flight.ended}")
            must(reply["collapsed"] == (flight.began_for != ask.id), f"{ask.id}: collapsed is wrong")
