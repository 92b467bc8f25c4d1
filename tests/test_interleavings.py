"""I1 to I8 hold in every order in which the scripts of two or three workers can run."""

from __future__ import annotations

from functools import partial

import pytest

from shared.messages import Mode
from tests.conftest import Server
from tests.history import Ask, Violation
from tests.interleavings import (
    Actor,
    Cast,
    Scenario,
    Step,
    changed,
    explore,
    hold_in_every_order,
    invalidator,
    killer,
    leader,
    lookup,
    perform,
    refresher,
    rescuer,
    thief,
)
from tests.world import World


async def two_askers(w: World, tag: str) -> Cast:
    """Two lookup workers with the same question and different tags, the LLM worker, an invalidation."""
    tag = tag.replace("K", w.key)
    return {
        "p": lookup(w, "p", Ask("r1", ("x",))),
        "q": lookup(w, "q", Ask("r2", ("x", "y"))),
        "a": leader(w, "a"),
        "i": invalidator(w, tag),
    }


async def overtaken(w: World, *, fails: bool = False) -> Cast:
    """A flight is in the air; an invalidation, somebody who asks after it, two LLM workers."""
    await perform(w, lookup(w, "first", Ask("r1", ("x",))))
    return {
        "a": leader(w, "a", fails=fails),
        "i": invalidator(w, "x"),
        "p": lookup(w, "p", Ask("r2", ("x",))),
        "b": leader(w, "b"),
    }


async def failed_and_replaced(w: World) -> Cast:
    """The leader fails while its flight may have been replaced; two others ask."""
    await perform(w, lookup(w, "first", Ask("r1", ("x",))))
    second = Ask("r2", ("x",))
    return {
        "a": leader(w, "a", fails=True),
        "i": invalidator(w, "x"),
        "p": lookup(w, "p", second),
        "q": lookup(w, "q", Ask("r3", ("x",)), after=second),
    }


async def lease_lost(w: World, *, fails: bool = False, rescued_by_failing: bool = False) -> Cast:
    """The leader pauses past its lease at any moment; another worker finishes; somebody joins meanwhile."""
    await perform(w, lookup(w, "first", Ask("r1", ("x",))))
    return {
        "a": leader(w, "a", fails=fails),
        "b": rescuer(w, "b", fails=rescued_by_failing),
        "p": lookup(w, "p", Ask("r2", ("x",))),
    }


async def lease_lost_and_invalidated(w: World) -> Cast:
    """The same with an invalidation in the middle of it."""
    await perform(w, lookup(w, "first", Ask("r1", ("x",))))
    return {"a": leader(w, "a", renews=True), "b": rescuer(w, "b"), "i": invalidator(w, "x")}


async def leader_dies(w: World) -> Cast:
    """The leader is killed at any moment; somebody joins, something is invalidated."""
    await perform(w, lookup(w, "first", Ask("r1", ("x",))))
    cast: Cast = {"a": leader(w, "a"), "p": lookup(w, "p", Ask("r2", ("x", "y"))), "i": invalidator(w, "y")}
    cast["k"] = killer("a", cast)
    return cast


async def three_llm_workers(w: World) -> Cast:
    """Two workers take the fill over, one after the other, from a leader that wakes up."""
    await perform(w, lookup(w, "first", Ask("r1", ("x",))))
    awake = leader(w, "a")
    await perform(w, awake, 1)
    return {"a": _resumed(awake), "b": rescuer(w, "b"), "c": rescuer(w, "c")}


async def _resumed(actor: Actor) -> Actor:
    """An actor that has taken steps already. Its next step is `land`."""
    yield Step("land")
    async for step in actor:
        yield step


async def stolen_request(w: World) -> Cast:
    """A lookup worker pauses past its lease; another joins the same message."""
    ask = Ask("r1", ("x",))
    return {"p": lookup(w, "p", ask), "q": thief(w, "q", ask), "a": leader(w, "a"), "i": invalidator(w, "x")}


async def modes(w: World, first: Mode, second: Mode, *, stored: bool = False) -> Cast:
    """Two requests that differ in what they may read and store."""
    if stored:
        await perform(w, lookup(w, "before", Ask("r0", ("x",))))
        await perform(w, leader(w, "before"))
    return {
        "p": lookup(w, "p", Ask("r1", ("x",), first)),
        "q": lookup(w, "q", Ask("r2", ("x",), second)),
        "a": leader(w, "a"),
    }


async def stored_and_invalidated(w: World) -> Cast:
    """An answer is stored; it is invalidated while somebody asks who does not name its tags."""
    await perform(w, lookup(w, "before", Ask("r0", ("x",))))
    await perform(w, leader(w, "before"))
    return {"i": invalidator(w, "x"), "p": lookup(w, "p", Ask("r1")), "a": leader(w, "a")}


async def refresh_fails(w: World) -> Cast:
    """An answer is stored and computed anew, in vain; it is invalidated meanwhile; a worker may take over."""
    await perform(w, lookup(w, "before", Ask("r0", ("x",))))
    await perform(w, leader(w, "before"))
    await perform(w, lookup(w, "first", Ask("r1", ("x",), "refresh")))
    return {"a": leader(w, "a", fails=True), "b": rescuer(w, "b", fails=True), "i": invalidator(w, "x")}


async def refreshed(w: World, *, failing: bool = False) -> Cast:
    """What is stored is refreshed by two workers at once, and invalidated; somebody asks for it anew."""
    await perform(w, lookup(w, "before", Ask("r0", ("x",))))
    await perform(w, leader(w, "before"))
    return {
        "r": refresher(w, "r", "x"),
        **({} if failing else {"s": refresher(w, "s", "x")}),
        "p": lookup(w, "p", Ask("r1", ("x",), "refresh")),
        "i": invalidator(w, "x"),
        "a": leader(w, "a", fails=failing),
    }


MODES: tuple[Mode, ...] = ("default", "refresh", "no-store", "bypass")
SCENARIOS: dict[str, Scenario] = {
    "two_askers_x": partial(two_askers, tag="x"),
    "two_askers_y": partial(two_askers, tag="y"),
    "two_askers_all": partial(two_askers, tag="all"),
    "two_askers_key": partial(two_askers, tag="key:K"),
    "overtaken": overtaken,
    "overtaken_failing": partial(overtaken, fails=True),
    "failed_and_replaced": failed_and_replaced,
    "lease_lost": lease_lost,
    "lease_lost_failing": partial(lease_lost, fails=True),
    "lease_lost_rescuer_fails": partial(lease_lost, rescued_by_failing=True),
    "lease_lost_and_invalidated": lease_lost_and_invalidated,
    "leader_dies": leader_dies,
    "three_llm_workers": three_llm_workers,
    "stolen_request": stolen_request,
    "stored_and_invalidated": stored_and_invalidated,
    "refresh_fails": refresh_fails,
    "refreshed": refreshed,
    "refreshed_failing": partial(refreshed, failing=True),
    **{f"modes_{a}_{b}": partial(modes, first=a, second=b) for a in MODES for b in MODES if a <= b},
    **{f"stored_{a}_{b}": partial(modes, first=a, second=b, stored=True) for a in MODES for b in MODES if a <= b},
}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_every_order_keeps_the_invariants(server: Server, name: str) -> None:
    await hold_in_every_order(server.url, name, SCENARIOS)


OWNS = {
    "land": "if not owns(stream, group, consumer, id) then return { 'LOST' } end",
    "fail": "if not owns(stream, group, consumer, id) then return { 'LOST' } end",
    "clear": "if not owns(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return 0 end",
    "resume": "if not owns(KEYS[1], ARGV[1], ARGV[2], ARGV[3]) then return { 'LOST' } end",
    "join": "if owns(KEYS[1], group, consumer, ARGV[i]) then",
    "renew": "if owns(KEYS[1], ARGV[1], ARGV[2], id) then",
}
#: What is left out: the scenario that finds it, the script, its text, what stands there instead.
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "land without ownership": ("lease_lost", "land", OWNS["land"], ""),
    "land without epochs": (
        "overtaken",
        "land",
        "if pruned(tags_key, epoch) or invalidated(tags_key, key, labels, epoch) then return 'invalidated' end",
        "",
    ),
    "land without the token": ("modes_bypass_default", "land", "if current then\n  reason", "if true then\n  reason"),
    "land with the leader's tags only": (
        "two_askers_y",
        "land",
        "lines(current and flight[2] or ARGV[7])",
        "lines(ARGV[7])",
    ),
    "land without the directives": (
        "modes_no-store_no-store",
        "land",
        "if store ~= '1' then",
        "if false then",
    ),
    "land that leaves the flight": (
        "two_askers_x",
        "land",
        "if current then redis.call('DEL', KEYS[3], KEYS[9]) end",
        "",
    ),
    "land without its outcome": (
        "lease_lost",
        "land",
        "redis.call('SET', KEYS[5], reason .. '\\n' .. text, 'PX', ARGV[10])",
        "",
    ),
    "fail without ownership": ("lease_lost_failing", "fail", OWNS["fail"], ""),
    "fail without the token": (
        "failed_and_replaced",
        "fail",
        "if redis.call('HGET', KEYS[2], 'token') == ARGV[4] then",
        "if true then",
    ),
    "fail without its outcome": (
        "lease_lost_failing",
        "fail",
        "redis.call('SET', KEYS[4], outcome, 'PX', ARGV[6])",
        "",
    ),
    "fail with an entry that was invalidated": (
        "refresh_fails",
        "fail",
        "if invalidated(tags_key, key, entry.labels, entry.epoch) then return nil end",
        "",
    ),
    "clear without ownership": ("lease_lost", "clear", OWNS["clear"], ""),
    "resume without ownership": ("three_llm_workers", "resume", OWNS["resume"], ""),
    "resume without the outcome": ("lease_lost", "resume", "if done then", "if false then"),
    "renew without ownership": ("lease_lost_and_invalidated", "renew", OWNS["renew"], "if true then"),
    "join without ownership": ("stolen_request", "join", OWNS["join"], "if true then"),
    "join without another look at the entry": (
        "two_askers_x",
        "join",
        "if entry and entry.created >= tonumber(ARGV[6])",
        "if false",
    ),
    "join without looking for a flight": ("two_askers_x", "join", "if flight[1] then", "if false then"),
    "join aboard an overtaken flight": (
        "overtaken",
        "join",
        "if not pruned(KEYS[5], flight[2]) and not invalidated(KEYS[5], key, all, flight[2]) then",
        "if true then",
    ),
    "join with the joiner's tags forgotten": (
        "two_askers_y",
        "join",
        "redis.call('HSET', KEYS[4], 'tags', table.concat(all, '\\n'))",
        "",
    ),
    "join with the joiner's wish to store forgotten": (
        "modes_default_no-store",
        "join",
        "redis.call('HSET', KEYS[4], 'store', '1')",
        "",
    ),
    "join that leaves a refresh with the refreshes": (
        "refreshed",
        "join",
        "redis.call('XADD', KEYS[2], '*', unpack(found[1][2]))",
        "",
    ),
    "join that takes a refresh twice": (
        "refreshed",
        "join",
        "if found[1] and (taken.err or #taken == 0) then",
        "if found[1] then",
    ),
    "revalidate without looking for a flight": ("refreshed", "revalidate", "elseif flies then", "elseif false then"),
    "invalidate without the markers": ("two_askers_x", "invalidate", "redis.call('HSET', KEYS[2], ARGV[i], id)", ""),
    "invalidate without the clock": ("two_askers_x", "invalidate", "redis.call('HSET', KEYS[2], '#last', id)", ""),
    "fetch without the markers": (
        "stored_and_invalidated",
        "fetch",
        "elseif invalidated(KEYS[1], key, entry.labels, entry.epoch) then",
        "elseif false then",
    ),
    "reply without the clock": ("lease_lost", "reply", "if now_ms() > tonumber(ARGV[1]) then return -1 end", ""),
    "retire without ownership": ("stored_default_default", "retire", "if asked[entry[1]] then", "if false then"),
}


@pytest.mark.parametrize("name", MUTATIONS)
async def test_a_script_with_a_hole_is_caught(server: Server, name: str) -> None:
    scenario, script, text, instead = MUTATIONS[name]
    with pytest.raises(Violation):
        await explore(server.url, SCENARIOS[scenario], changed=changed(script, text, instead))
    with server.connect() as connection:
        connection.flushall()
