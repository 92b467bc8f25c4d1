"""The steps that workers take in a partition: the real scripts, each held against the history as it returns."""

from __future__ import annotations

from typing import Any

import orjson

from shared import keys
from shared.entry import pack, unpack
from shared.outbox import Outbox, waiter
from shared.scripts import Arg
from tests.history import ERROR, KEEP_MS, TTL_MS, Ask, Flight, LostLease, must
from tests.ledger import Ledger
from workers.consumer import Message, messages_of, server_ms
from workers.flight import Fill, Outcome


class World(Ledger):
    """A partition with its history, and the scripts as functions of it."""

    # a lookup worker's steps

    async def publish(self, who: str, ask: Ask) -> bytes | None:
        """Publish a request, read it, look at L2: return the entry, if any."""
        k = self.k
        ask.published = self.step
        self.asked[ask.id] = ask
        replies = await self.link.send(
            [
                self.call("publish", [k.requests], [100, ask.id, self.client, 0, b"{}", ""]),
                ("XREADGROUP", "GROUP", keys.LOOKUP_GROUP, who, "COUNT", 1, "STREAMS", k.requests, ">"),
                self.call("fetch", [k.tags, k.entry(self.key)], [self.key, "\n".join(ask.tags)]),
            ]
        )
        ask.message = replies[1][0][1][0][0]
        self.requests[ask.message] = who
        found = replies[2][1]
        if isinstance(found, bytes) and ask.reads:
            self.serve(ask, self.flights[self.answer_of(found)])
            return found
        must(not (ask.reads and self.fit_entry(set(ask.tags))), "a stored answer was not found")
        return None

    async def steal(self, who: str, ask: Ask) -> None:
        """Take a message over from a lookup worker whose lease ran out."""
        claimed = await self.link.call(("XCLAIM", self.k.requests, keys.LOOKUP_GROUP, who, 0, ask.message))
        if claimed:
            self.requests[ask.message] = who

    async def join(self, who: str, ask: Ask, token: str) -> bytes | None:
        """Join or begin a flight; return the entry when one has been stored meanwhile."""
        k, key, labels = self.k, self.key, set(ask.tags)
        token = token if ask.shared else f"{self.client}.{ask.id}"
        (_, now) = await self.link.send([("PING",), ("TIME",)])
        names = [
            k.requests, k.fills, k.entry(key), k.flight(key), k.tags, k.waiters(key, ""), k.failed(key), k.refreshes,
        ]  # fmt: skip
        args: list[Arg] = [
            keys.LOOKUP_GROUP, who, key, token, ask.mode, 0, TTL_MS, int(ask.stores), server_ms(now) + KEEP_MS, 100,
            b"{}", orjson.dumps(self._spec(labels)), "\n".join(sorted(labels)), 0, keys.LLM_GROUP, ask.message,
            waiter(self.client, ask.id.encode()),
        ]  # fmt: skip
        refreshes = ("XLEN", k.refreshes)
        before, result, after = await self.link.send([refreshes, self.call("join", names, args), refreshes])
        status, owned = result[0].decode(), self.requests.get(ask.message) == who
        must((status != "LOST") == owned, f"I6: {who} joined a message it does not own, or was refused its own")
        if status == "LOST":
            self.wrote_nothing = True
        elif status == "HIT":
            must(ask.reads, f"{ask.mode} was answered from the cache")
            self.serve(ask, self.flights[self.answer_of(result[1])])
            return bytes(result[1])
        elif status == "BEGUN":
            self._begun(ask, labels, result[1].decode())
        else:
            self._joined(ask, labels, result[1].decode(), adopted=after < before)
        return None

    def _begun(self, ask: Ask, labels: set[str], token: str) -> None:
        live = [
            f.token
            for f in self.flights.values()
            if f.shared and ask.shared and not f.ended and not self.overtaken(f, f.tags | labels)
        ]
        must(not live, f"I1: {token} began while {live} was live")
        must(not (ask.reads and self.fit_entry(labels)), f"{token} began although the answer is stored")
        flight = Flight(token, self.step, set(labels), ask.shared, ask.stores, ask.id, [ask.id])
        self.flights[token] = flight
        if ask.shared:
            self.current = token
        self.unread += 1
        del self.requests[ask.message]
        self.serve(ask, flight)

    def _joined(self, ask: Ask, labels: set[str], token: str, *, adopted: bool) -> None:
        flight = self.flights[token]
        if adopted:  # a refresh that nobody had taken up, or waited for, became this request's fill
            must(not flight.began_for and not flight.waiters, "a refresh became a fill twice")
            flight.began_for = ask.id
        must(flight.shared and ask.shared, "somebody joined, or joined from, a bypass")
        must(not flight.ended, f"I2: {ask.id} joined {token}, which had ended: nobody will tell it")
        flight.tags |= labels
        flight.store |= ask.stores
        flight.waiters.append(ask.id)
        del self.requests[ask.message]
        self.serve(ask, flight)

    async def revalidate(self, who: str, labels: set[str]) -> None:
        """Ask for a refresh of whatever is stored, or of nothing."""
        k, key, token = self.k, self.key, f"refresh-{who}"
        spec = orjson.dumps(self._spec(labels))
        (judged,) = await self.link.call(
            self.call(
                "revalidate",
                [k.refreshes, k.tags, k.entry(key), k.flight(key), k.failed(key)],
                [100, KEEP_MS, key, token, b"{}", spec, "\n".join(sorted(labels)), TTL_MS, 1 << 50],
            )
        )
        live = [
            f.token
            for f in self.flights.values()
            if f.shared and not f.ended and not self.overtaken(f, f.tags | labels)
        ]
        must(judged == (2 if live else 1), f"I1: asked to refresh with {live} under way, the script says {judged}")
        if judged == 1:
            self.flights[token] = Flight(token, self.step, set(labels), True, True)
            self.current = token
            self.unread += 1

    @staticmethod
    def _spec(labels: set[str]) -> dict[str, Any]:
        spec = {"endpoint": "responses", "model": "m", "tags": sorted(labels), "ttl_ms": TTL_MS}
        return spec | dict.fromkeys(("stale_ms", "error_ms"), 0) | {"probation_ms": KEEP_MS}

    async def answer(self, who: str, ask: Ask, entry: bytes) -> None:
        """Reply from an entry, and retire the request."""
        outbox = Outbox(1000)
        outbox.add(self.client, ask.id.encode(), unpack(self.key, entry).reply("l2", 0))
        owned = self.requests.get(ask.message) == who
        sent = await self.send(outbox, 1 << 50 if owned else 0)
        must(sent == [1 if owned else -1], f"I6: {who} replied without the lease, or could not with it")
        retired = await self.link.call(self.call("retire", [self.k.requests], [keys.LOOKUP_GROUP, who, ask.message]))
        must(retired == owned, "I6: retired by somebody else, or not by its owner")
        self.wrote_nothing = not owned
        if owned:
            del self.requests[ask.message]

    async def invalidate(self, tags: tuple[str, ...]) -> None:
        """Invalidate; it counts from this step on."""
        await self.link.call(self.call("invalidate", [self.k.invalidations, self.k.tags], ["t", 1000, *tags]))
        self.invalidated.append((self.step, set(tags)))

    # an LLM worker's steps

    async def take(self, who: str) -> Fill:
        """Read a fill and begin to compute."""
        k = self.k
        for stream in (k.fills, k.refreshes):
            read = await self.link.call(
                ("XREADGROUP", "GROUP", keys.LLM_GROUP, who, "COUNT", 1, "STREAMS", stream, ">"),
            )
            if read:
                break
        must(read, "I8: what somebody waits for is in no stream any more")
        fill = Fill.read(stream, messages_of(read[0][1])[0])
        self.unread -= 1
        self.owner[fill.id] = who
        self.flights[fill.token].computed += 1
        return fill

    def abandoned_by_others(self, who: str) -> bool:
        """Whether there is a fill to reclaim."""
        return any(owner != who for owner in self.owner.values())

    async def reclaim(self, who: str) -> Fill:
        """Take over the first fill another worker holds: its lease ran out."""
        k = self.k
        (_, ids, *_) = await self.link.call(
            ("XAUTOCLAIM", k.fills, keys.LLM_GROUP, who, 0, "0-0", "COUNT", 10, "JUSTID"),
        )
        taken = next(i for i in ids if self.owner[i] != who)
        _, raw = await self.link.call(self.call("redeliver", [k.fills], [keys.LLM_GROUP, who, 1, taken]))
        for message_id in ids:
            self.owner[message_id] = who
        fill = Fill.read(k.fills, Message(taken, dict(zip(raw[0][1][::2], raw[0][1][1::2], strict=True)), raw[0][2]))
        self.flights[fill.token].reclaimed += 1
        return fill

    def _checked(self, who: str, fill: Fill, reply: list[Any]) -> str:
        status, owned = reply[0].decode(), self.owner.get(fill.id) == who
        must((status != "LOST") == owned, f"I6: {who} got {status} and does {'' if owned else 'not '}own the fill")
        self.wrote_nothing = status == "LOST"
        if status == "LOST":
            raise LostLease
        if status == "DONE":
            must(self.flights[fill.token].ended, "an outcome was found that nobody settled")
        return str(status)

    def _names(self, fill: Fill) -> list[str]:
        k = self.k
        return [
            fill.stream,
            k.flight(fill.key),
            k.waiters(fill.key, fill.token),
            k.outcome(fill.key, fill.token),
        ]

    async def renew(self, who: str, fill: Fill) -> bool:
        """Renew the lease; False when it is lost."""
        args: list[Arg] = [keys.LLM_GROUP, who, KEEP_MS, fill.id, fill.token]
        (kept,) = await self.link.call(self.call("renew", self._names(fill)[:3], args))
        must(bool(kept) == (self.owner.get(fill.id) == who), "I6: a lost lease was renewed, or a good one was not")
        self.wrote_nothing = not kept
        return bool(kept)

    async def resume(self, who: str, fill: Fill) -> Outcome | None:
        """Look what is left to do; None: compute."""
        reply = await self.link.call(self.call("resume", self._names(fill), [keys.LLM_GROUP, who, fill.id, fill.token]))
        status = self._checked(who, fill, reply)
        flight = self.flights[fill.token]
        if status == "DONE":
            return Outcome.recorded(fill, reply)
        must(status == "COMPUTE", f"I2: {fill.token} was given up though somebody waits")
        must(not flight.ended, f"I1: {fill.token} is computed again though it had ended")
        flight.computed += 1
        must(flight.computed <= 1 + flight.reclaimed, f"I1: {fill.token} was computed {flight.computed} times")
        return None

    async def land(self, who: str, fill: Fill) -> Outcome:
        """Publish the answer."""
        k, body = self.k, orjson.dumps({"answer": fill.token})
        meta, packed = pack(body, model="m", compute_ms=1, compress_above=1000)
        stream, flight, waiters, outcome = self._names(fill)
        reply = await self.link.call(
            self.call(
                "land",
                [
                    stream, k.entry(fill.key), flight, waiters, outcome, k.tags, k.landed, k.invalidations,
                    k.failed(fill.key),
                ],
                [
                    keys.LLM_GROUP, who, fill.id, fill.key, fill.token, fill.epoch, fill.tags, fill.ttl_ms, "",
                    KEEP_MS, meta, packed, 1000, 0, 0, KEEP_MS, "{}", "", 1000,
                ],
            )
        )  # fmt: skip
        status = self._checked(who, fill, reply)
        if status == "DONE":
            return Outcome.recorded(fill, reply)
        self._landed(self.flights[fill.token], status)
        landed = Outcome.landed(fill, reply, body, "simulated")
        self._aboard(fill, landed)
        return landed

    def _landed(self, flight: Flight, reason: str) -> None:
        must(not flight.ended, f"{flight.token} landed twice")
        overtaken = self.overtaken(flight, flight.tags)
        current = self.current == flight.token
        if reason == "stored":
            must(flight.shared and flight.store, f"{flight.token} was stored against its directives")
            must(current and not overtaken, f"I4: {flight.token} was overtaken and stored")
            before = self.flights.get(self.entry)
            must(before is None or before.began <= flight.began, "I7: an older answer overwrote a newer one")
            self.entry = flight.token
            self.landed.append(flight.token)
        else:
            must(not (current and flight.store and not overtaken), f"a good answer was not stored: {reason}")
        flight.ended = reason
        self.current = "" if current else self.current

    def _aboard(self, fill: Fill, outcome: Outcome) -> None:
        told = [aboard.split(b" ")[1].decode() for aboard in outcome.waiters]
        expected = self.flights[fill.token].waiters
        must(told == expected, f"I2: {fill.token} tells {told}, but {expected} wait for it")

    async def fail(self, who: str, fill: Fill) -> Outcome:
        """End the flight with an error."""
        k, error = self.k, orjson.dumps(ERROR.to_wire())
        names = [*self._names(fill), k.entry(fill.key), k.tags, k.failed(fill.key), k.landed]
        args: list[Arg] = [
            keys.LLM_GROUP, who, fill.id, fill.token, error, KEEP_MS, fill.key, 0, ERROR.code, "{}", 1000,
        ]  # fmt: skip
        reply = await self.link.call(self.call("fail", names, args))
        status = self._checked(who, fill, reply)
        if status == "DONE":
            return Outcome.recorded(fill, reply)
        flight = self.flights[fill.token]
        must(not flight.ended, f"{fill.token} failed after it had ended")
        flight.ended = "failed"
        outcome = Outcome.recorded(fill, reply)
        fit = self.current == fill.token and self.fit_entry(flight.tags)
        must((outcome.spare is not None) == fit, "I3: an unfit entry stands in for an answer, or a fit one does not")
        if fit:
            flight.spare = self.entry
            must(self.answer_of(reply[3].split(b"\n", 2)[2]) == self.entry, "another entry stands in than is stored")
        self.current = "" if self.current == fill.token else self.current
        self._aboard(fill, outcome)
        return outcome

    async def tell(self, who: str, fill: Fill, outcome: Outcome) -> None:
        """Reply to everyone aboard. A lease that was lost has run out by the server's clock."""
        owned = self.owner.get(fill.id) == who
        outbox = Outbox(1000)
        outbox.add_waiters(outcome.waiters, outcome.first, outcome.rest, outcome.strict)
        sent = await self.send(outbox, outcome.now_ms + KEEP_MS if owned else outcome.now_ms - 1)
        expected = [1 if owned else -1] if outcome.waiters else []
        must(sent == expected, f"I6: {who} replied without the lease, or could not with it")
        self.wrote_nothing = not owned
        if not owned:
            raise LostLease

    async def clear(self, who: str, fill: Fill) -> None:
        """Forget the flight."""
        stream, _, waiters, outcome = self._names(fill)
        cleared = await self.link.call(
            self.call("clear", [stream, waiters, outcome], [keys.LLM_GROUP, who, fill.id]),
        )
        must(bool(cleared) == (self.owner.get(fill.id) == who), "I6: cleared by somebody else, or not by its owner")
        self.wrote_nothing = not cleared
        if cleared:
            del self.owner[fill.id]
