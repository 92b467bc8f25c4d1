"""Retries by real attempts: what is tried again, how long is waited, when it is given up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from shared.errors import ProviderError, ProviderTimeout, ProviderUnreachable, RateLimited
from shared.providers import Call, Completion, Provider
from shared.providers.retry import with_retries
from shared.settings import Settings
from tests.openai_server import CHAT, GOOD, Scripted, configured, refusal, scripted


async def retried(
    provider: Provider, settings: Settings, told: Callable[[ProviderError], object] = bool, **options: Any
) -> Completion:
    """Ask with retries; `told` hears each attempt's error."""

    async def attempt(seconds: float) -> Completion:
        try:
            return await provider.complete(Call("chat/completions", CHAT, seconds))
        except ProviderError as error:
            told(error)
            raise

    return await with_retries(attempt, settings, provider=provider.name, **options)


async def test_a_retryable_error_is_tried_again() -> None:
    errors: list[ProviderError] = []
    script = refusal(500, "oops"), Scripted(cut="unanswered"), refusal(429, "slow down"), Scripted()
    async with scripted(*script) as (server, provider):
        completion = await retried(provider, configured(), errors.append)
    assert (completion.body, len(server.seen)) == (GOOD, 4)
    assert [type(error) for error in errors] == [ProviderError, ProviderUnreachable, RateLimited]


async def test_an_error_of_the_caller_is_never_tried_again() -> None:
    async with scripted(refusal(400, "bad field")) as (server, provider):
        with pytest.raises(ProviderError, match="bad field"):
            await retried(provider, configured())
    assert len(server.seen) == 1


async def test_the_last_error_is_raised_when_attempts_are_used_up() -> None:
    async with scripted(refusal(500, "first"), refusal(503, "second"), Scripted()) as (server, provider):
        with pytest.raises(ProviderError, match="second"):
            await retried(provider, configured(attempts=2))
    assert len(server.seen) == 2


async def test_retry_after_is_waited_for() -> None:
    async with scripted(refusal(429, "slow down", headers={"retry-after-ms": "300"})) as (_, provider):
        began = time.monotonic()
        await retried(provider, configured(), chance=random.Random(1))
    assert 0.3 <= time.monotonic() - began < 3


async def test_a_retry_after_beyond_the_time_left_fails_at_once() -> None:
    async with scripted(refusal(429, "slow down", headers={"retry-after": "60"})) as (server, provider):
        began = time.monotonic()
        with pytest.raises(RateLimited) as caught:
            await retried(provider, configured())
    assert time.monotonic() - began < 3
    assert (caught.value.retry_after, len(server.seen)) == (60.0, 1)


async def test_a_back_off_beyond_the_time_left_fails_at_once_with_the_provider_s_error() -> None:
    async with scripted(refusal(500, "oops")) as (_, provider):
        began = time.monotonic()
        with pytest.raises(ProviderError, match="oops"):
            await retried(provider, configured(backoff_initial=60, backoff_max=60))
    assert time.monotonic() - began < 3


async def test_a_slow_attempt_is_cut_and_the_next_one_answers() -> None:
    async with scripted(Scripted(delay=30), Scripted()) as (server, provider):
        completion = await retried(provider, configured(attempt_timeout=0.3))
        await asyncio.wait_for(server.hung_up.wait(), 5)
    assert completion.body == GOOD


async def test_the_total_time_out_ends_everything_and_names_the_last_error() -> None:
    script = [refusal(500, "oops"), Scripted(delay=30)]
    async with scripted(*script) as (_, provider):
        with pytest.raises(ProviderTimeout, match=r"0\.5 s in all after 2 attempts .*oops.*MILLPOND_TOTAL_TIMEOUT"):
            await retried(provider, configured(), total_timeout=0.5)


async def test_an_attempt_that_never_ends_is_cut_by_the_loop_itself() -> None:
    async def attempt(_: float) -> None:
        await asyncio.Event().wait()

    with pytest.raises(ProviderTimeout, match=r"gave no answer within 0\.05 s"):
        await with_retries(attempt, configured(attempt_timeout=0.05, attempts=2), provider="p")


async def test_cancellation_ends_the_retries() -> None:
    failed = asyncio.Event()
    async with scripted(*[refusal(500, "oops")] * 3) as (server, provider):
        settings = configured(backoff_initial=5, backoff_max=5, total_timeout=60)
        task = asyncio.create_task(retried(provider, settings, lambda _: failed.set()))
        await asyncio.wait_for(failed.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(server.seen) == 1


async def test_time_up_while_waiting_for_admission_is_a_rate_limit() -> None:
    async def attempt(_: float) -> None:
        raise AssertionError("was never admitted")

    with pytest.raises(RateLimited, match="MILLPOND_REQUESTS_PER_MINUTE"):
        await with_retries(attempt, configured(), provider="p", total_timeout=0.1, admit=lambda: asyncio.Event().wait())
