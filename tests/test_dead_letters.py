"""A message that kills every worker it meets: buried in the end, its requesters told, the innocent unharmed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from producers.reply import Reply
from shared.errors import InvalidRequest, Poisoned
from shared.scripts import SCRIPTS
from tests import faults_support
from tests.faults_support import Pond, Raw, answers, body_of, outcomes, until
from tests.processes import Process
from tests.proxy import Proxy
from workers.dead_letters import Letter, find, letters, retry

pond = faults_support.pond

POISON = "What is arsenic?"
GOOD = [f"What is bread made of? ({n})" for n in range(6)]


@asynccontextmanager
async def killed_by(pond: Pond, kind: str, script: str, marker: bytes) -> AsyncIterator[Callable[[], int]]:
    """Run worker after worker of a kind; whichever is about to run `script` with `marker` is killed before it does.

    Yields how many were killed so far.
    """
    deaths = 0
    living: list[Process] = []

    def strike(data: bytes) -> bool:
        if SCRIPTS[script].sha.encode() not in data or marker not in data or not living:
            return False
        living.pop().sigkill()
        return True

    async def keep_one_alive() -> None:
        nonlocal deaths
        while True:
            async with pond.process(kind, ready=False, url=proxy.url) as process:
                living.append(process)
                await asyncio.to_thread(process.wait, 60)
                deaths += 1

    async with Proxy.to(pond.url) as proxy:
        proxy.cut_before(strike, times=1000)
        keeper = asyncio.create_task(keep_one_alive())
        try:
            yield lambda: deaths
        finally:
            for process in living:
                process.send(signal.SIGTERM)
            await asyncio.sleep(0)
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)


def found_letters(pond: Pond) -> list[Letter]:
    return list(letters(pond.redis, range(pond.partitions)))


async def test_a_request_that_kills_lookup_workers_is_buried_and_the_innocent_are_answered(
    pond: Pond, partitions: int
) -> None:
    pond.options |= {"max_deliveries": 3}
    async with pond.working("llm"), pond.client() as client:
        bad = asyncio.create_task(client.ask(POISON))
        good = [asyncio.create_task(client.ask(prompt)) for prompt in GOOD]
        async with killed_by(pond, "lookup", "join", POISON.encode()) as deaths:
            (told,) = await outcomes([bad])
            await answers(good)
            await pond.settled()
            assert deaths() == 3
    assert isinstance(told, Poisoned)
    (letter,) = found_letters(pond)
    assert (letter.message["body"], letter.deliveries) == (body_of(POISON), 3)
    assert "without an outcome" in letter.reason
    assert pond.calls() == len(GOOD)


async def test_a_fill_that_kills_llm_workers_is_buried_and_the_innocent_are_answered(
    pond: Pond, partitions: int
) -> None:
    """The poison is computed first and its landing kills: whatever is in flight beside it dies each time with it."""
    pond.options |= {"max_deliveries": 3}
    async with pond.working("lookup"), pond.client() as client, pond.client() as follower:
        bad = [asyncio.create_task(client.ask(POISON)), asyncio.create_task(follower.ask(POISON))]
        await until(lambda: pond.length("fills") == 1, "the poison is first in line")
        good = [asyncio.create_task(client.ask(prompt)) for prompt in GOOD]
        await until(lambda: pond.length("fills") == 1 + len(GOOD), "all wait to be computed")
        async with killed_by(pond, "llm", "land", pond.key(POISON).encode()) as deaths:
            told = await outcomes(bad)
            found = await outcomes(good)
            await pond.settled()
            assert deaths() == 3
    assert [type(one) for one in told] == [Poisoned] * 2
    assert [type(one) for one in found] == [Reply] * len(GOOD)
    (letter,) = found_letters(pond)
    assert (letter.message["key"], letter.deliveries) == (pond.key(POISON).encode(), 3)
    assert pond.calls(POISON) == 3


async def test_a_buried_fill_can_be_retried_once_and_its_answer_is_stored(pond: Pond, partitions: int) -> None:
    async with pond.client() as client:
        letter = await _bury_the_fill(pond)
        async with pond.working("lookup", "llm"):
            assert retry(pond.redis, letter, pond.settings)
            assert not retry(pond.redis, letter, pond.settings), "it was retried meanwhile"
            await until(lambda: pond.calls(POISON) > 2, "it is computed again")
            await pond.settled()
            assert (await client.ask(POISON)).tier in ("l1", "l2")
            await pond.settled()
    assert found_letters(pond) == []
    assert pond.calls(POISON) == 3


async def _bury_the_fill(pond: Pond) -> Letter:
    """Let one fill kill two workers where two are the limit, and a third bury it."""
    options: dict[str, Any] = {"max_deliveries": 2}
    raw = Raw(pond)
    async with pond.working("lookup", **options):
        raw.publish("r1", POISON)
        async with AsyncExitStack() as stack:
            for _ in range(2):
                victim = await stack.enter_async_context(
                    pond.process("llm", fault="kill@llm_after_compute", ready=False, **options)
                )
                assert await asyncio.to_thread(victim.wait) == -9
        async with pond.working("llm", **options):
            assert (await raw.answered("r1"))["error"]["code"] == "poisoned"
            await pond.settled()
    (letter,) = found_letters(pond)
    assert find(pond.redis, range(pond.partitions), letter.id) == letter
    return letter


async def test_a_buried_request_can_be_retried_and_is_answered_to_whoever_asked(pond: Pond) -> None:
    pond.options |= {"max_deliveries": 1}
    raw = Raw(pond)
    async with pond.process("lookup", fault="kill@lookup_after_read") as victim:
        raw.publish("r1", POISON)
        assert await asyncio.to_thread(victim.wait) == -9
    async with pond.working("lookup", "llm"):
        assert (await raw.answered("r1"))["error"]["code"] == "poisoned"
        (letter,) = found_letters(pond)
        assert retry(pond.redis, letter, pond.settings)
        await until(lambda: len(raw.replies("r1")) == 2, "it is answered")
        await pond.settled()
    assert raw.replies("r1")[1]["tier"] == "llm"
    assert found_letters(pond) == []


async def test_an_error_recorded_for_a_poisoned_fill_never_hides_an_answer_that_had_landed(pond: Pond) -> None:
    """Killed twice after landing, at the limit: who buries it tells the waiters the answer, not the poison."""
    options: dict[str, Any] = {"max_deliveries": 2}
    raw = Raw(pond)
    async with pond.working("lookup"):
        raw.publish("r1", POISON)
        for _ in range(2):
            async with pond.process("llm", fault="kill@llm_after_land", ready=False, **options) as victim:
                assert await asyncio.to_thread(victim.wait) == -9
        async with pond.working("llm", **options):
            assert (await raw.answered("r1"))["tier"] == "llm"
            await pond.settled()
    assert pond.calls() == 1


async def test_a_letter_without_a_request_can_only_be_read(pond: Pond) -> None:
    async with pond.working("lookup"):
        pond.redis.xadd(pond.all_names()[0].requests, {"x": "y"})
        await until(lambda: pond.length("dead") == 1, "it is buried")
        await pond.settled()
    (letter,) = found_letters(pond)
    with pytest.raises(InvalidRequest):
        retry(pond.redis, letter, pond.settings)
    assert found_letters(pond) == [letter]
