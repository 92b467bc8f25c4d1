"""The same partition with a durable tier beside it: what leaves L2, comes back, and is pruned; and when.

What PostgreSQL has committed for the key is one value here, changed by the steps that stand for transactions: the real
ones have tests on a real server. What is explored is the order in which they meet the scripts.
"""

from __future__ import annotations

from shared.entry import unpack
from tests.history import Ask
from tests.interleavings import Actor, Step, joined, leader, perform
from tests.world import World
from workers.sweep import epoch_of


class Durable:
    """What PostgreSQL holds of a world's key."""

    def __init__(self, w: World, *, floors: bool = True) -> None:
        self.w = w
        self.row: bytes | None = None
        self.floor = (0, 0)
        self.floors = floors
        self.persisted = 0

    async def landed(self) -> list[bytes]:
        """Return what landed, the oldest first."""
        found = await self.w.link.call(("XRANGE", self.w.k.landed, "-", "+"))
        said = [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in found]
        return [one[b"entry"] for one in said if b"entry" in one]

    def commit(self, text: bytes) -> None:
        """Write an answer, unless it is older than what is there, or than the floor."""
        epoch = epoch_of(text.split(b" ", 2)[1].decode())
        newer = self.row is None or epoch_of(self.row.split(b" ", 2)[1].decode()) <= epoch
        if newer and (epoch >= self.floor or not self.floors):
            self.row = text


async def deep(d: Durable, who: str, ask: Ask, *, after_invalidation: bool = False) -> Actor:
    """A lookup worker that looks into L3 for what L2 has not, judges it, and joins a flight if need be."""
    w, k = d.w, d.w.k
    yield Step("look", lambda: bool(w.invalidated) or not after_invalidation)
    entry = await w.publish(who, ask)
    if entry is None:
        fence = await w.link.call(("HGET", k.tags, "#fence")) or b"0"
        yield Step("find")
        text = d.row
        if text is not None:
            yield Step("rehydrate")
            call = w.call("rehydrate", [k.tags, k.entry(w.key)], [fence, w.key, text, 60_000, "\n".join(ask.tags)])
            ((judged,), held) = await w.link.send([call, ("GET", k.entry(w.key))])
            w.entry = w.answer_of(held) if held else ""
            if judged:
                entry = held
                w.serve(ask, w.flights[w.answer_of(held)])
    async for step in joined(w, who, ask, entry):
        yield step


async def lander(w: World, who: str) -> Actor:
    """An LLM worker that has computed, lands, and dies; whoever comes later tells and clears."""
    awake = leader(w, who)
    yield Step("land", lambda: True)
    await perform(w, awake, 2)
    await awake.aclose()


async def evictor(d: Durable) -> Actor:
    """The probation of what is in L2 ends."""
    yield Step("evict")
    await d.w.link.call(("DEL", d.w.k.entry(d.w.key)))
    d.w.entry = ""


async def persister(d: Durable) -> Actor:
    """A persistence worker writes what landed, all in one transaction."""
    yield Step("commit", lambda: len(d.w.landed) > d.persisted)
    landed = await d.landed()
    for text in landed[d.persisted :]:
        d.commit(text)
    d.persisted = len(landed)


async def frozen_persister(d: Durable, text: bytes) -> Actor:
    """One that has read a message before it froze; another has written that meanwhile."""
    yield Step("commit late", lambda: d.persisted > 0)
    d.commit(text)


async def pruner(d: Durable, tag: str) -> Actor:
    """The invalidation worker prunes a tag's marker, in the order of workers/prune.py."""
    w, k = d.w, d.w.k
    yield Step("begin", lambda: bool(w.invalidated))
    at = (await w.link.call(("HGET", k.tags, tag))).decode()
    await w.link.call(w.call("prune", [k.tags], ["begin", at]))
    yield Step("floor", lambda: d.persisted == len(w.landed))
    d.floor = epoch_of(at)
    row = unpack(w.key, d.row) if d.row is not None else None
    if row is not None and tag in row.tags and epoch_of(row.epoch) < epoch_of(at):
        d.row = None
    yield Step("sweep")
    if await w.link.call(w.call("sweep", [k.tags, k.entry(w.key)], ["delete", ""])):
        w.entry = ""
    yield Step("end")
    await w.link.call(w.call("prune", [k.tags], ["end", tag, at]))
