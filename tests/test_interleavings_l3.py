"""I3, I4 and I7 hold in every order of landings, evictions, look-ups in PostgreSQL, invalidations and prunings."""

from __future__ import annotations

from functools import partial

import pytest

from tests.conftest import Server
from tests.durable_world import Durable, deep, evictor, frozen_persister, lander, persister, pruner
from tests.history import Ask, Violation
from tests.interleavings import (
    Actor,
    Cast,
    Scenario,
    changed,
    explore,
    hold_in_every_order,
    invalidator,
    leader,
    lookup,
    perform,
)
from tests.world import World


async def _then(first: Actor, second: Actor) -> Actor:
    """One actor's steps, then another's."""
    for actor in (first, second):
        async for step in actor:
            yield step


async def _stored(w: World, *, floors: bool = True, persisted: bool = True, evicted: bool = True) -> Durable:
    """An answer has landed; where it lies now is up to the scenario."""
    d = Durable(w, floors=floors)
    await perform(w, lookup(w, "before", Ask("r0", ("x",))))
    await perform(w, leader(w, "before"))
    if persisted:
        await perform(w, persister(d))
    if evicted:
        await perform(w, evictor(d))
    return d


async def comes_back(w: World) -> Cast:
    """It lies in PostgreSQL alone. Somebody asks who does not name its tag; it is invalidated, the marker is pruned."""
    d = await _stored(w)
    return {
        "d": deep(d, "d", Ask("r1")),
        "i": _then(invalidator(w, "x"), pruner(d, "x")),
        "v": evictor(d),
    }


async def foreign_tag(w: World) -> Cast:
    """The same, asked by somebody who brings a tag it does not carry, and that is invalidated."""
    d = await _stored(w)
    return {
        "d": deep(d, "d", Ask("r1", ("y",))),
        "i": _then(invalidator(w, "y"), pruner(d, "y")),
        "v": evictor(d),
    }


async def late_commit(w: World, *, floors: bool = True) -> Cast:
    """It has landed and is written by two, of whom one was frozen; it is invalidated and pruned; somebody asks."""
    d = await _stored(w, floors=floors, persisted=False)
    (text,) = await d.landed()
    return {
        "s": persister(d),
        "z": frozen_persister(d, text),
        "i": _then(invalidator(w, "x"), pruner(d, "x")),
        "d": deep(d, "d", Ask("r1"), after_invalidation=True),
    }


async def late_landing(w: World) -> Cast:
    """It is still being computed when its tag is invalidated and the marker pruned; somebody asks after that."""
    d = Durable(w)
    await perform(w, lookup(w, "before", Ask("r0", ("x",))))
    return {
        "a": lander(w, "a"),
        "i": _then(invalidator(w, "x"), pruner(d, "x")),
        "d": deep(d, "d", Ask("r1", ("x",)), after_invalidation=True),
    }


SCENARIOS: dict[str, Scenario] = {
    "comes_back": comes_back,
    "foreign_tag": foreign_tag,
    "late_commit": late_commit,
    "late_landing": late_landing,
}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_every_order_keeps_the_invariants(server: Server, name: str) -> None:
    await hold_in_every_order(server.url, name, SCENARIOS)


#: The scenario that finds it, the script, its text, what stands there instead; or the scenario alone.
HOLES: dict[str, tuple[Scenario, str, str, str] | tuple[Scenario]] = {
    "rehydrate without the markers": (
        comes_back,
        "rehydrate",
        "or invalidated(KEYS[1], key, entry.labels, entry.epoch) then",
        "then",
    ),
    "rehydrate without the fence": (comes_back, "rehydrate", "fence ~= ARGV[1] or", ""),
    "rehydrate without the request's own labels": (
        foreign_tag,
        "rehydrate",
        "entry and fit_for(KEYS[1], key, lines(asked), entry) and",
        "entry and",
    ),
    "labels that were pruned count as never invalidated": (
        foreign_tag,
        "rehydrate",
        "return not pruned(tags_key, entry.epoch) and not invalidated(tags_key, key, foreign, entry.epoch)",
        "return not invalidated(tags_key, key, foreign, entry.epoch)",
    ),
    "land without the horizon": (late_landing, "land", "if pruned(tags_key, epoch) or", "if"),
    "join aboard what began before the horizon": (
        late_landing,
        "join",
        "if not pruned(KEYS[5], flight[2]) and",
        "if",
    ),
    "prune that leaves the fence": (comes_back, "prune", "redis.call('HINCRBY', tags, '#fence', 1)", ""),
    "a floor that nobody heeds": (partial(late_commit, floors=False),),
}


@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.leaves("a schedule that failed is not cleaned up")
async def test_a_hole_is_found(server: Server, hole: str) -> None:
    scenario, *change = HOLES[hole]
    with pytest.raises(Violation):
        await explore(server.url, scenario, changed=changed(*change) if change else {})
