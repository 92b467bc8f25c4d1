"""The circuits of providers: what opens them, who may probe, and an outage seen by a whole pool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from shared import keys
from shared.errors import ContentFiltered, ProviderError, ProviderTimeout, ProviderUnreachable, RateLimited
from shared.providers.breaker import Breaker, CircuitOpen, Turn, is_ill
from shared.providers.chain import Route, ask
from shared.providers.simulated import SimulatedProvider
from shared.settings import Settings
from tests import faults_support
from tests.conftest import Server
from tests.faults_support import Pond, outcomes, until
from tests.outages import Outage
from workers import doctor

pond = faults_support.pond

ILL = ProviderError("down", status=503)
NAME = "p:m"
KEY = f"{keys.BREAKER_PREFIX}:{NAME}"


@pytest.fixture
async def two(server: Server, settings: Callable[..., Settings]) -> AsyncIterator[tuple[Breaker, Breaker]]:
    """Two processes' view of the same circuits, open for 0.2 s after three failures."""
    made = settings(breaker_failures=3, breaker_reset=0.2, attempt_timeout=1.0)
    pair = Breaker(made, server.url), Breaker(made, server.url)
    yield pair
    for breaker in pair:
        await breaker.close()


async def failing(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        await breaker.tell(NAME, await breaker.ask(NAME), ProviderError("down", status=503))


async def probing(breaker: Breaker) -> Turn:
    """Wait until a call is let through; return its turn."""
    while True:
        try:
            return await breaker.ask(NAME)
        except CircuitOpen as refusal:
            await asyncio.sleep(refusal.retry_after or 0)


@pytest.mark.parametrize(
    ("error", "ill"),
    [
        (ILL, True), (ProviderTimeout("slow"), True), (ProviderUnreachable("gone"), True),
        (RateLimited("429", status=429), False), (ContentFiltered("no", status=400), False),
        (ProviderError("bad", status=404), False), (ProviderError("odd"), False),
    ],
)  # fmt: skip
def test_only_a_provider_that_does_not_answer_is_ill(error: ProviderError, ill: bool) -> None:
    assert is_ill(error) == ill


async def test_failures_in_a_row_open_a_circuit_for_the_whole_pool(two: tuple[Breaker, Breaker]) -> None:
    one, other = two
    await failing(one, 2)
    await one.tell(NAME, await one.ask(NAME), None)
    await failing(other, 2)
    await one.look(NAME)
    await failing(one, 1)
    for breaker in two:
        with pytest.raises(CircuitOpen, match="left alone for another 0") as refusal:
            await breaker.ask(NAME)
        assert 0 < (refusal.value.retry_after or 0) <= 0.2
        assert refusal.value.to_wire()["code"] == "provider_unreachable"
    await one.look("p:another")


async def test_a_process_that_found_a_circuit_well_learns_of_the_others_failures_soon(
    two: tuple[Breaker, Breaker],
) -> None:
    one, other = two
    await other.ask(NAME)
    await failing(one, 3)
    with pytest.raises(CircuitOpen):
        for _ in range(100):
            await other.tell(NAME, await other.ask(NAME), None)
            await asyncio.sleep(0.01)


async def test_one_call_of_the_pool_probes_and_its_success_closes(server: Server, two: tuple[Breaker, Breaker]) -> None:
    one, other = two
    await failing(one, 3)
    probe = await probing(other)
    for breaker in two:
        with pytest.raises(CircuitOpen):
            await breaker.ask(NAME)
    await one.tell(NAME, Turn("a call from before"), None)
    with pytest.raises(CircuitOpen):
        await one.ask(NAME)
    await other.tell(NAME, probe, None)
    await one.ask(NAME)
    with server.connect() as connection:
        assert not connection.exists(KEY)


async def test_a_probe_that_fails_leaves_it_open_for_as_long_again(two: tuple[Breaker, Breaker]) -> None:
    one, other = two
    await failing(one, 3)
    await one.tell(NAME, await probing(one), ProviderError("still", status=500))
    with pytest.raises(CircuitOpen) as refusal:
        await other.ask(NAME)
    assert 0.1 < (refusal.value.retry_after or 0) <= 0.2


async def test_a_probe_that_is_given_up_makes_room_for_another(two: tuple[Breaker, Breaker]) -> None:
    one, other = two
    await failing(one, 3)
    one.give_up(NAME, await probing(one), ill=False)
    await one.look(NAME)  # on the same connection, so behind it
    await other.ask(NAME)


async def test_a_prober_that_dies_loses_its_turn(server: Server, settings: Callable[..., Settings]) -> None:
    made = settings(breaker_failures=1, breaker_reset=0.05, attempt_timeout=0.01)
    breaker = Breaker(made, server.url)
    await failing(breaker, 1)
    await probing(breaker)
    with pytest.raises(CircuitOpen) as refusal:
        await breaker.ask(NAME)
    assert (refusal.value.retry_after or 0) > 0.5
    assert await probing(breaker)
    with server.connect() as connection:
        assert 0 < connection.pttl(KEY) <= 70_000
    await breaker.close()


async def test_the_doctor_tells_of_an_open_circuit(
    two: tuple[Breaker, Breaker], settings: Callable[..., Settings]
) -> None:
    def seen() -> list[str]:
        return [finding.detail for finding in doctor.examine(settings()) if finding.subject == "circuit"]

    await failing(two[0], 2)
    assert await asyncio.to_thread(seen) == []
    await failing(two[0], 1)
    (detail,) = await asyncio.to_thread(seen)
    assert detail.startswith(f"{NAME} failed 3 times in a row")


async def test_an_error_that_a_batch_shares_counts_once(two: tuple[Breaker, Breaker]) -> None:
    breaker, shared = two[0], ProviderError("down", status=503)
    for _ in range(5):
        await breaker.tell(NAME, await breaker.ask(NAME), shared)
    await breaker.ask(NAME)


async def test_without_redis_every_circuit_is_closed(settings: Callable[..., Settings], tmp_path: Any) -> None:
    breaker = Breaker(settings(breaker_failures=1), f"unix://{tmp_path}/nothing.sock")
    await failing(breaker, 3)
    await breaker.close()


async def test_an_attempt_that_is_cut_by_its_time_out_counts(server: Server, settings: Callable[..., Settings]) -> None:
    made = settings(
        breaker_failures=2, attempts=2, attempt_timeout=0.05, backoff_initial=0.0, simulated_first_token=30.0
    )
    breaker, routes = Breaker(made, server.url), [Route("slow", SimulatedProvider(made, "slow"))]
    with pytest.raises(ProviderTimeout):
        await ask(routes, "responses", {"model": "m", "input": "x"}, made, breaker=breaker)
    with pytest.raises(CircuitOpen):
        await ask(routes, "responses", {"model": "m", "input": "x"}, made, breaker=breaker)
    await breaker.close()


async def test_an_outage_under_load_ends_without_a_stampede_and_with_an_outcome_for_everyone(pond: Pond) -> None:
    outage = Outage(pond)
    pond.options |= {
        "simulated_first_token": 0.02, "breaker_failures": 3, "breaker_reset": 0.4,
        "attempts": 2, "backoff_initial": 0.01, "concurrency": 16,
        "profiles": {"response": {"negative_ttl": 0.1}},
    }  # fmt: skip
    asked: list[asyncio.Task[Any]] = []

    async def load(prefix: str, seconds: float) -> None:
        for n in range(int(seconds / 0.02)):
            asked.append(asyncio.create_task(client.ask(f"{prefix} {n}")))
            await asyncio.sleep(0.02)

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(pond.working("lookup"))
        for _ in range(2):
            await stack.enter_async_context(pond.process("llm"))
        client = await stack.enter_async_context(pond.client())
        await load("before", 0.5)
        outage.begin()
        before = pond.calls()
        await load("during", 2.0)
        during = pond.calls() - before
        outage.end()
        recovered = asyncio.create_task(load("after", 2.0))
        await until(lambda: not pond.found(f"{keys.BREAKER_PREFIX}:*"), "the circuit is closed")
        await recovered
        found = await outcomes(asked)
        await pond.settled()
    assert len(found) == len(asked)
    assert {type(one).__name__ for one in found} <= {"Reply", "ProviderError", "ProviderUnreachable"}
    assert all(not isinstance(one, Exception) for one in (*found[:20], *found[-20:]))
    # Opening takes three failures and what was under way; then there is one probe every 0.4 s, however many ask.
    assert during <= 3 + 2 + 2 * 6, during
    # Nothing was saved up: once it answers again, each new question is one call.
    assert pond.calls() - before - during <= 100 + 2 * 6
