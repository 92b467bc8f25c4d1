"""Requests and tokens per minute, shared by the whole pool through Redis.

The windows and their arithmetic are the `limits` library's sliding window counter: two small keys per limit, whatever
the rate, each with a TTL of two windows. Without a configured limit nothing is imported and nothing contacted.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True, eq=False)
class Place:
    """Somebody's place in the queue, with about the tokens of its call."""

    tokens: int
    #: done once it may call; cancelled once nobody waits for it
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class RateLimits:
    """The pool's limits, as one worker process sees them.

    Waiting is in order of arrival within a process: one caller looks at the full window, the others queue behind it.
    A call that would need more tokens than a whole window holds reserves a whole window. `period` is the length of a
    window in seconds, the "minute" of the settings.
    """

    def __init__(self, settings: Settings, url: str, *, period: int = 60) -> None:
        self._requests = settings.requests_per_minute
        self._tokens = settings.tokens_per_minute
        self._url = url
        self._period = period
        self._turn = asyncio.Lock()
        self._pool: ConnectionPool | None = None
        self._limiter: SlidingWindowCounterRateLimiter | None = None
        self._windows: list[RateLimitItem] = []

    @property
    def active(self) -> bool:
        """Whether any limit is configured."""
        return self._requests is not None or self._tokens is not None

    async def acquire(self, tokens: int) -> None:
        """Return once one call of about `tokens` tokens may be made; at once when no limit is configured.

        Raises:
            Unavailable: Redis could not be reached.
        """
        await self.acquire_together([Place(tokens)])

    async def acquire_together(self, places: Sequence[Place]) -> None:
        """Admit `places`, whose calls may go out as one, in one turn; return once none of them waits.

        The first waits for a request and its own tokens; those for whose tokens there is room at that moment are
        admitted with it, for the same request. The rest follow in the same way. Tokens are never saved up for a whole
        group: callers elsewhere who ask for less would take each as it frees.

        Raises:
            Unavailable: Redis could not be reached; who was not admitted still waits.
        """
        try:
            async with self._turn:
                while waiting := [place for place in places if not place.admitted.done()]:
                    await self._pass_all(waiting[0], waiting[1:])
        except (RedisError, OSError) as error:
            raise Unavailable(
                f"the rate limits could not be read from Redis: {error}; check that it runs (`millpond doctor`)"
            ) from error

    async def close(self) -> None:
        """Close the connections to Redis. Safe to call twice."""
        pool, self._pool, self._limiter = self._pool, None, None
        if pool is not None:
            await pool.aclose()

    async def _pass_all(self, first: Place, others: Sequence[Place]) -> None:
        along = len(others)
        if self.active:
            limiter = self._open()
            for window in self._windows:
                while not await limiter.hit(window, cost=_cost(window, first)):
                    stats = await limiter.get_window_stats(window)
                    pause = min(max(stats.reset_time - time.time(), _SHORTEST_PAUSE), _LONGEST_PAUSE)
                    await asyncio.wait([first.admitted], timeout=pause * random.uniform(1.0, 1.25))
                    if first.admitted.done():  # given up: the next is not kept waiting for its tokens
                        return
            others = [place for place in others if not place.admitted.done()]
            along = await self._along(others)
        for place in (first, *others[:along]):
            if not place.admitted.done():
                place.admitted.set_result(None)

    async def _along(self, others: Sequence[Place]) -> int:
        """Take the tokens of as many of `others`, in order, as there is room for now; return how many."""
        limiter, most = self._open(), len(others)
        for window in self._windows:
            if window.namespace != "tokens":
                continue
            while most:
                room = (await limiter.get_window_stats(window)).remaining
                costs = list(itertools.accumulate(_cost(window, place) for place in others[:most]))
                most = bisect.bisect_right(costs, room)
                if most and await limiter.hit(window, cost=costs[most - 1]):
                    break
                most //= 2  # somebody was faster
        return most

    def _open(self) -> SlidingWindowCounterRateLimiter:
        if self._limiter is None:
            from limits import RateLimitItemPerSecond
            from limits.aio.storage import RedisStorage
            from limits.aio.strategies import SlidingWindowCounterRateLimiter

            amounts = {"tokens": self._tokens, "requests": self._requests}
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


def _cost(window: RateLimitItem, place: Place) -> int:
    return min(place.tokens, window.amount) if window.namespace == "tokens" else 1
