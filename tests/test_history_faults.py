"""Random interleavings of use and of faults, over all tiers; what clients saw is held against I2, I3, I4 and I7.

`MILLPOND_TEST_TURMOIL` is how many seconds of it (default 6); the seed in the header repeats the decisions taken here.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from shared import embedded
from shared.embedded import EmbeddedRedis
from shared.postgres import EmbeddedPostgres
from shared.scripts import SCRIPTS
from shared.tiers.l1 import L1
from tests import conftest, openai_server
from tests.databases import Database
from tests.faults_support import QUICK, Pond
from tests.test_stateful import without
from tests.turmoil import OPTIONS, QUESTIONS, CountingProvider, Fleet, Turmoil, for_seconds, users, written
from tests.witness import first
from workers import prune

SECONDS = float(os.environ.get("MILLPOND_TEST_TURMOIL", "6"))
CHAOS_TIMEOUT = 120 + 3 * SECONDS


@pytest.fixture
def durable_server(server_kind: str, tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that has written what it acknowledged, whatever befalls it."""
    if server_kind in ("url", "container"):
        pytest.skip("needs a server of its own to kill")
    binary = conftest._binary(server_kind)
    with embedded.start(tmp_path / "own", binary=binary, options={"appendfsync": "always"}) as running:
        yield running


def turmoil_on(url: str, database_url: str, tmp_path: Path, rng: random.Random, **options: object) -> Turmoil:
    given = QUICK | OPTIONS | {"database_url": database_url, "simulated_journal": tmp_path / "unused.jsonl"} | options
    return Turmoil(Pond(url, redis.Redis.from_url(url), given), rng)


@pytest.mark.timeout(CHAOS_TIMEOUT)
async def test_nothing_old_is_answered_whatever_befalls_the_deployment(
    durable_server: EmbeddedRedis, own_database: EmbeddedPostgres, tmp_path: Path, rng: random.Random
) -> None:
    turmoil = turmoil_on(durable_server.url, own_database.url, tmp_path, rng, partitions=2)
    fleet = Fleet(turmoil, durable_server, own_database)
    async with CountingProvider(turmoil.history, rng, 0.15) as provider:
        turmoil.pond.options |= {"openai_base_url": provider.url, "openai_api_key": openai_server.KEY}
        try:
            await fleet.start()
            attacks = [
                fleet.kill_worker, fleet.kill_worker, fleet.kill_worker, fleet.freeze_worker, fleet.restart_redis,
                fleet.restart_database,
            ]  # fmt: skip
            async with users(turmoil, askers=6, every=0.15) as tasks:
                attack = asyncio.create_task(turmoil.attacking(attacks, 0.8, fleet.revive))
                pruning = asyncio.create_task(turmoil.pruning(own_database.url))
                await for_seconds(SECONDS, attack, pruning, *tasks)
                turmoil.done.set()
                await asyncio.gather(attack, pruning)
                await fleet.revive()
            await finish(turmoil)
        finally:
            fleet.close()
            turmoil.pond.redis.close()
    told = f"{turmoil.history.tiers()}, {len(turmoil.history.invalidations)} invalidations, {turmoil.attacks}"
    assert turmoil.history.violations() == [], f"{first(turmoil.history.violations())}\n{told}"
    assert set(turmoil.history.tiers()) >= {"l1", "l2", "l3", "llm"}, told
    print(told)


async def finish(turmoil: Turmoil) -> None:
    """When all is quiet, ask once more, of L3: what is stored there is the newest."""
    await written(turmoil.pond)
    for name in turmoil.pond.found("{mp:*}:entry:*"):
        turmoil.pond.redis.unlink(name)
    async with turmoil.pond.client() as client:
        for prompt in QUESTIONS:
            await turmoil.ask(client, prompt)


def _deaf(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(L1, "invalidate", lambda self, tags: None)


def _script(name: str, text: str, instead: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setitem(SCRIPTS, name, without(name, text, instead))


async def _nothing(*_: object, **__: object) -> int:
    return 0


def _prune_leaves_l3(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prune, "sweep_l3", _nothing)


HOLES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "L1 deaf to the log": _deaf,
    "L3 comes back past its markers": _script("rehydrate", "or invalidated(KEYS[1], key, entry.labels, entry.epoch)"),
    "a flight lands past its markers": _script(
        "land", "pruned(tags_key, epoch) or invalidated(tags_key, key, labels, epoch)", "false"
    ),
    "markers are pruned before L3 is clean": _prune_leaves_l3,
}


@pytest.mark.leaves("ends in the middle of things")
@pytest.mark.parametrize("server_kind", conftest._kinds()[:1], indirect=True)
@pytest.mark.parametrize("hole", HOLES)
async def test_a_hole_is_found(
    server: conftest.Server,
    database: Database,
    tmp_path: Path,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
    hole: str,
) -> None:
    HOLES[hole](monkeypatch)
    monkeypatch.setattr("shared.link._LOADING", [("SCRIPT", "LOAD", script.source) for script in SCRIPTS.values()])
    turmoil = turmoil_on(server.url, database.url, tmp_path, rng)
    async with CountingProvider(turmoil.history, rng, 0.05) as provider:
        turmoil.pond.options |= {"openai_base_url": provider.url, "openai_api_key": openai_server.KEY}
        async with (
            turmoil.pond.working("lookup", "llm", "persistence"),
            users(turmoil, askers=4, every=0.05) as tasks,
        ):
            pruning = asyncio.create_task(turmoil.pruning(database.url))
            for _ in range(40):
                await for_seconds(0.5, pruning, *tasks)
                if old(turmoil):
                    break
            turmoil.done.set()
            await pruning
    turmoil.pond.redis.close()
    assert old(turmoil), f"nobody noticed: {turmoil.history.tiers()}"


def old(turmoil: Turmoil) -> list[str]:
    """Return what was answered or stored although it was too old."""
    return [problem for problem in turmoil.history.violations() if problem.startswith(("I3", "I4"))]
