"""Every order of the steps of several actors, depth first, each schedule in a partition of its own.

An actor is an async generator that yields before each of its steps. A schedule is the string of the actors' letters
in the order of their steps. A failure names the scenario and the schedule; run that one alone with

    MILLPOND_TEST_SCHEDULE="lease_lost:abAbA" pytest tests/test_interleavings.py
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass

import pytest

from shared.link import Link
from shared.scripts import SCRIPTS, Script
from tests.history import Ask, LostLease, Violation, must
from tests.world import World
from workers.flight import Fill, Outcome

AT_ONCE = 96
_partitions = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Step:
    """What an actor does next, and whether it can."""

    label: str
    when: Callable[[], bool] = bool(1).__bool__


Actor = AsyncGenerator[Step, None]
Cast = dict[str, Actor]
Scenario = Callable[[World], Awaitable[Cast]]


# actors


async def lookup(w: World, who: str, ask: Ask, *, after: Ask | None = None) -> Actor:
    """A request is published, read and looked up; then it joins a flight, or is answered.

    `after` orders two requests that are alike, so that no schedule is run twice under two names.
    """
    yield Step("look", lambda: after is None or bool(after.message))
    async for step in joined(w, who, ask, await w.publish(who, ask)):
        yield step


async def joined(w: World, who: str, ask: Ask, entry: bytes | None) -> Actor:
    """What a lookup worker does with what it found: it joins a flight if that is nothing, and answers if it can."""
    if entry is None:
        yield Step("join")
        entry = await w.join(who, ask, who)
    if entry is not None:
        yield Step("answer")
        await w.answer(who, ask, entry)


async def refresher(w: World, who: str, *tags: str) -> Actor:
    """A lookup worker that has served an answer past its time asks for a refresh."""
    yield Step("revalidate")
    await w.revalidate(who, set(tags))


async def thief(w: World, who: str, ask: Ask) -> Actor:
    """Another lookup worker, which takes the message over and joins it too."""
    yield Step("steal", lambda: bool(ask.message))
    await w.steal(who, ask)
    if w.requests.get(ask.message) == who:
        async for step in joined(w, who, ask, None):
            yield step


async def leader(w: World, who: str, *, fails: bool = False, renews: bool = False) -> Actor:
    """An LLM worker takes a fill, computes it, and settles it."""
    yield Step("take", lambda: w.unread > 0)
    fill = await w.take(who)
    if renews:
        yield Step("renew")
        if not await w.renew(who, fill):
            return
    async for step in _settled(w, who, fill, None, fails=fails):
        yield step


async def rescuer(w: World, who: str, *, fails: bool = False) -> Actor:
    """Another LLM worker reclaims what the first holds and finishes it."""
    yield Step("reclaim", lambda: w.abandoned_by_others(who))
    fill = await w.reclaim(who)
    yield Step("resume")
    try:
        outcome = await w.resume(who, fill)
    except LostLease:
        return
    async for step in _settled(w, who, fill, outcome, fails=fails):
        yield step


async def _settled(w: World, who: str, fill: Fill, outcome: Outcome | None, *, fails: bool) -> Actor:
    try:
        if outcome is None:
            yield Step("fail" if fails else "land")
            outcome = await (w.fail if fails else w.land)(who, fill)
        yield Step("tell")
        await w.tell(who, fill, outcome)
        yield Step("clear")
        await w.clear(who, fill)
    except LostLease:
        return


async def invalidator(w: World, *tags: str) -> Actor:
    """One invalidation."""
    yield Step("invalidate")
    await w.invalidate(tags)


async def killer(victim: str, cast: Cast) -> Actor:
    """Kill another actor, wherever it is."""
    yield Step(f"kill {victim}", lambda: victim in cast)
    await cast.pop(victim).aclose()


# the explorer


async def play(link: Link, scenario: Scenario, prefix: str, scripts: Mapping[str, Script]) -> tuple[str, list[str]]:
    """Run the schedule that begins with `prefix`; return it whole, and the prefixes that branch off after it.

    Raises:
        Violation: an invariant broke; the message has the schedule.
    """
    w = World(link, next(_partitions), scripts)
    await w.begin()
    cast = await scenario(w)
    steps = {name: await anext(actor) for name, actor in cast.items()}
    schedule, told, branches = "", [], []
    try:
        while enabled := [name for name in cast if steps[name].when()]:
            chosen = prefix[len(schedule)] if len(schedule) < len(prefix) else enabled[0]
            if len(schedule) >= len(prefix):
                branches += [schedule + other for other in enabled[1:]]
            must(chosen in enabled, f"no such schedule: after {schedule!r} only {enabled} can go on")
            schedule += chosen
            told.append(f"{chosen}.{steps[chosen].label}")
            await _advance(w, chosen, cast, steps)
        await _drain(w)
        await w.settle()
    except (Violation, KeyError, StopIteration, IndexError) as error:
        raise Violation(f"{error!r}\nschedule {schedule}: {' '.join(told)}") from error
    finally:
        for actor in cast.values():
            await actor.aclose()
    return schedule, branches


async def _advance(w: World, name: str, cast: Cast, steps: dict[str, Step]) -> None:
    w.step += 1
    try:
        steps[name] = await anext(cast[name])
    except StopAsyncIteration:
        cast.pop(name, None)
    await w.look()


async def _drain(w: World) -> None:
    """Whatever the actors left behind is finished by workers that come later."""
    for at in itertools.count():
        if w.abandoned_by_others(""):
            actor = rescuer(w, f"rescuer{at}")
        elif w.unread:
            actor = leader(w, f"leader{at}")
        else:
            return
        await perform(w, actor)


async def perform(w: World, actor: Actor, steps: int = 100) -> Actor:
    """Let one actor take its next steps with nobody else on stage; return it, waiting before the next."""
    cast: Cast = {"z": actor}
    waiting = {"z": await anext(actor)}
    while cast and steps:
        steps -= 1
        await _advance(w, "z", cast, waiting)
    return actor


async def explore(url: str, scenario: Scenario, *, changed: Mapping[str, Script] | None = None) -> int:
    """Run every schedule of a scenario; return how many there are. `changed` scripts replace the real ones.

    Raises:
        Violation: in the first schedule that breaks an invariant.
    """
    link = Link(url)
    scripts = {**SCRIPTS, **(changed or {})}
    try:
        await link.send([("SCRIPT", "LOAD", script.source) for script in scripts.values()])
        waiting, count = [""], 0
        while waiting:
            batch, waiting = waiting[-AT_ONCE:], waiting[:-AT_ONCE]
            played = await asyncio.gather(*(play(link, scenario, p, scripts) for p in batch), return_exceptions=True)
            for result in played:
                if isinstance(result, BaseException):
                    raise result
                waiting += result[1]
            count += len(played)
            await link.call(("FLUSHALL",))
        return count
    finally:
        await link.close()


async def replay(url: str, scenario: Scenario, schedule: str) -> None:
    """Run one schedule."""
    link = Link(url)
    try:
        await play(link, scenario, schedule, SCRIPTS)
    finally:
        await link.close()


async def hold_in_every_order(url: str, name: str, scenarios: Mapping[str, Scenario]) -> None:
    """Explore a scenario, or run the one schedule that the environment names; fail with what runs it again."""
    wanted, _, schedule = os.environ.get("MILLPOND_TEST_SCHEDULE", "").partition(":")
    if wanted and wanted != name:
        pytest.skip("another schedule is to be run again")
    if schedule:
        await replay(url, scenarios[name], schedule)
        return
    try:
        count = await explore(url, scenarios[name])
    except Violation as error:
        pytest.fail(f"{error}\nagain: MILLPOND_TEST_SCHEDULE={name}:SCHEDULE pytest tests -k every_order")
    assert count >= 2


def changed(name: str, old: str, new: str) -> dict[str, Script]:
    """Return a script with its last `old` replaced."""
    before, found, after = SCRIPTS[name].source.rpartition(old)
    assert found, f"{name}.lua no longer has {old!r}: correct this test"
    return {name: Script(name, before + new + after)}
