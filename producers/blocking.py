"""The same client for code without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from producers.cached import BlockingDecorator, Recipe
from producers.client import Client
from producers.degraded import Degraded
from shared.errors import Unavailable
from shared.profiles import DEFAULT_PROFILE
from shared.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[BlockingClient, P], T]:
    """Return a method of `Client` as one that waits for its result; same arguments, same errors."""

    @wraps(method)
    def call(self: BlockingClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._client, *args, **kwargs))

    return call


class BlockingClient:
    """`Client`, synchronous: its loop runs in a thread of its own. Safe to share between threads.

    with BlockingClient() as pond:
        print(pond.ask("What is a millpond?").text)
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        tenant: str = "default",
        profile: str = DEFAULT_PROFILE,
        degraded: Degraded = "fail",
        degrade_after: float = 1.0,
    ) -> None:
        self._client = Client(
            url, settings=settings, tenant=tenant, profile=profile, degraded=degraded, degrade_after=degrade_after
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="millpond", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        try:
            self._run(self._client.__aenter__())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise Unavailable("this client is closed: make a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    ask = _blocking(Client.ask)
    ask_body = _blocking(Client.ask_body)
    embed = _blocking(Client.embed)
    get = _blocking(Client.get)
    put = _blocking(Client.put)
    exists = _blocking(Client.exists)
    delete = _blocking(Client.delete)
    info = _blocking(Client.info)
    get_or_compute = _blocking(Client.get_or_compute)
    invalidate = _blocking(Client.invalidate)

    def cached(
        self,
        *,
        profile: str,
        key: str | Callable[..., Any] | None = None,
        tags: Sequence[str] | Callable[..., Sequence[str]] = (),
        ttl: float | None = None,
        tenant: str | None = None,
        scope: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> BlockingDecorator:
        """As `Client.cached`; the function, which runs in a thread of its own, stays a plain one."""
        ask = partial(self.get_or_compute, profile, ttl=ttl, tenant=tenant, scope=scope, timeout=timeout)
        return BlockingDecorator(ask, Recipe(key, tags))

    def close(self) -> None:
        """As `Client.close`; safe to call twice."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
