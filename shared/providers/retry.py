"""Another attempt, when another may succeed: jittered exponential back-off within one total time-out."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina

from shared.errors import ProviderError, ProviderTimeout, RateLimited
from shared.settings import Settings

T = TypeVar("T")

log = logging.getLogger("millpond.provider")

#: The longest random part of a back-off, as a multiple of `backoff_initial`.
_JITTER = 4.0
_CHANCE = random.Random()
#: Seconds: with less than this left, time is up. Timers may fire a little early.
_TOO_LITTLE = 0.01


async def with_retries(
    attempt: Callable[[float], Awaitable[T]],
    settings: Settings,
    *,
    provider: str,
    total_timeout: float | None = None,
    admit: Callable[[], Awaitable[object]] | None = None,
    chance: random.Random | None = None,
) -> T:
    """Run `attempt` until it succeeds, fails for good, or attempts or time are used up.

    `attempt` is given the seconds it may take and is cancelled after them. Before each one `admit` is awaited (the
    pool's rate limit), outside the attempt's own time-out. Retry-After is honoured, plus up to `backoff_initial`
    seconds of jitter drawn from `chance`, so that a pool does not come back as one; a wait that does not fit into the
    time left is not begun. `total_timeout` (seconds) defaults to the setting.

    Raises:
        ProviderError: the last attempt's error, when no further attempt may be made.
        ProviderTimeout: the total time-out passed during an attempt or a back-off.
        RateLimited: it passed while `admit` was waiting.
    """
    loop = asyncio.get_running_loop()
    total = settings.total_timeout if total_timeout is None else total_timeout
    deadline = loop.time() + total
    draw = (chance or _CHANCE).uniform
    last: ProviderError | None = None
    started, admitting, least_wait = 0, False, 0.0

    def again(error: Exception) -> bool | float:
        if not isinstance(error, ProviderError) or not error.retryable:
            return False  # cancellation comes by here too
        left = deadline - loop.time() - _TOO_LITTLE
        if error.retry_after is None:
            return least_wait < left
        return max(error.retry_after, 0.0) + draw(0.0, settings.backoff_initial) if error.retry_after < left else False

    try:
        async with asyncio.timeout_at(deadline) as scope:
            async for current in stamina.retry_context(
                on=again,
                attempts=settings.attempts,
                timeout=None,  # ours bounds the attempts and the waits alike
                wait_initial=settings.backoff_initial,
                wait_max=settings.backoff_max,
                wait_jitter=_JITTER * settings.backoff_initial,
            ):
                with current:
                    least_wait = current.next_wait
                    if admit is not None:
                        admitting = True
                        await admit()
                        admitting = False
                    started += 1
                    seconds = min(settings.attempt_timeout, deadline - loop.time())
                    try:
                        return await within(seconds, attempt, provider)
                    except ProviderError as error:
                        if error.retryable:
                            log.warning("%s, attempt %d of %d: %s", provider, started, settings.attempts, error)
                        if isinstance(error, ProviderTimeout) and deadline - loop.time() < _TOO_LITTLE:
                            raise _out_of_time(total, started, admitting, provider, last) from error
                        last = error
                        raise
    except TimeoutError:
        if not scope.expired():
            raise
        raise _out_of_time(total, started, admitting, provider, last) from last
    raise AssertionError("the retry loop ended without an outcome")


async def within(
    seconds: float, attempt: Callable[[float], Awaitable[T]], provider: str, setting: str = "MILLPOND_ATTEMPT_TIMEOUT"
) -> T:
    """Run one attempt, which is cancelled after `seconds`; `setting` bounds them.

    Raises:
        ProviderTimeout: it was.
    """
    try:
        async with asyncio.timeout(seconds) as scope:
            return await attempt(seconds)
    except TimeoutError:
        if not scope.expired():
            raise
        raise ProviderTimeout(
            f"{provider} gave no answer within {seconds:.3g} s; if it is merely slow, raise {setting}",
            provider=provider,
        ) from None


def _out_of_time(
    total: float, started: int, admitting: bool, provider: str, last: ProviderError | None
) -> ProviderError:
    after = f" after {started} attempt{'s' * (started != 1)}" + (f" (the last: {last.message})" if last else "")
    if admitting:
        return RateLimited(
            f"the pool's own rate limit admitted no call within {total:.3g} s{after}; raise "
            "MILLPOND_REQUESTS_PER_MINUTE or MILLPOND_TOKENS_PER_MINUTE, or ask less",
            provider=provider,
        )
    return ProviderTimeout(
        f"{provider} gave no answer within {total:.3g} s in all{after}; if it is merely slow, raise "
        "MILLPOND_TOTAL_TIMEOUT",
        provider=provider,
    )
