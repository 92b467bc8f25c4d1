"""Requests and tokens per minute, shared by the whole pool through Redis.

The windows and their arithmetic are the `limits` library's sliding window counter: two small keys per limit, whatever
the rate, each with a TTL of two windows. Without a configured limit nothing is imported and nothing contacted.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import orjson
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import RedisError

from shared import keys
from shared.errors import Unavailable
from shared.settings import Settings

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

#: Tokens reserved for an answer whose request sets no maximum.
UNBOUNDED_ANSWER = 256
#: Seconds between two looks at a full window.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0

_ASKED = ("messages", "input", "instructions", "tools", "response_format", "text")
_MAXIMA = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def estimate_tokens(body: dict[str, Any], endpoint: str) -> int:
    """Return the tokens to reserve for a call: a quarter of its prompt's characters, and the most it may answer."""
    asked = {name: body[name] for name in _ASKED if name in body}
    prompt = len(orjson.dumps(asked, default=str).decode()) // 4
    if endpoint == "embeddings":
        return max(prompt, 1)
    most = next((body[name] for name in _MAXIMA if isinstance(body.get(name), int)), UNBOUNDED_ANSWER)
    choices = body["n"] if isinstance(body.get("n"), int) else 1
    return max(prompt + most * choices, 1)


class RateLimits:
    """The pool's limits, as one worker process sees them.

    Waiting is in order of arrival within a process: one caller looks at the full window, the others queue behind it.
    A call that would need more tokens than a whole window holds reserves a whole window. `period` is the length of a
    window in seconds, the "minute" of the settings.
    """

    def __init__(self, settings: Settings, url: str, *, period: int = 60) -> None:
        self._requests = settings.requests_per_minute
        #: tokens per window, if they are limited
        self.tokens = settings.tokens_per_minute
        self._url = url
        self._period = period
        self._turn = asyncio.Lock()
        self._pool: ConnectionPool | None = None
        self._limiter: SlidingWindowCounterRateLimiter | None = None
        self._windows: list[RateLimitItem] = []

    @property
    def active(self) -> bool:
        """Whether any limit is configured."""
        return self._requests is not None or self.tokens is not None

    async def acquire(self, tokens: int) -> None:
        """Return once one call of about `tokens` tokens may be made; at once when no limit is configured.

        Raises:
            Unavailable: Redis could not be reached.
        """
        if not self.active:
            return
        try:
            async with self._turn:
                await self._pass_all(tokens)
        except (RedisError, OSError) as error:
            raise Unavailable(
                f"the rate limits could not be read from Redis: {error}; check that it runs (`millpond doctor`)"
            ) from error

    async def close(self) -> None:
        """Close the connections to Redis. Safe to call twice."""
        pool, self._pool, self._limiter = self._pool, None, None
        if pool is not None:
            await pool.aclose()

    async def _pass_all(self, tokens: int) -> None:
        limiter = self._open()
        for window in self._windows:
            cost = min(tokens, window.amount) if window.namespace == "tokens" else 1
            while not await limiter.hit(window, cost=cost):
                stats = await limiter.get_window_stats(window)
                pause = min(max(stats.reset_time - time.time(), _SHORTEST_PAUSE), _LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(1.0, 1.25))

    def _open(self) -> SlidingWindowCounterRateLimiter:
        if self._limiter is None:
            from limits import RateLimitItemPerSecond
            from limits.aio.storage import RedisStorage
            from limits.aio.strategies import SlidingWindowCounterRateLimiter

            amounts = {"tokens": self.tokens, "requests": self._requests}
            self._windows = [
                RateLimitItemPerSecond(amount, self._period, namespace)
                for namespace, amount in amounts.items()
                if amount is not None
            ]
            self._pool = ConnectionPool.from_url(self._url, socket_connect_timeout=5.0, socket_timeout=15.0)
            # the pool is ours, so that every URL the rest of the project understands works here too
            options: dict[str, Any] = {"connection_pool": self._pool}
            storage = RedisStorage("async+redis://", implementation="redispy", key_prefix=keys.LIMIT_PREFIX, **options)
            self._limiter = SlidingWindowCounterRateLimiter(storage)
        return self._limiter
