"""The chain of providers a profile is answered by: each asked in turn, until one answers or the time is over.

An item of a chain is `NAME:MODEL` (a model may contain colons) or `NAME`, which asks for the request's own model. The
deployment's total time-out is shared: a provider gets its part of what is left, so that one that hangs leaves time for
the next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from shared.errors import ConfigError, ContentFiltered, MillpondError, ProviderError, ProviderTimeout, Unavailable
from shared.providers import make_provider
from shared.providers.base import Call, Completion, Provider
from shared.providers.batching import EmbeddingBatches
from shared.providers.breaker import Breaker, CircuitOpen
from shared.providers.limits import Place, RateLimits, estimate_tokens
from shared.providers.resolver import ResolverProvider
from shared.providers.retry import with_retries, within
from shared.settings import Settings

log = logging.getLogger("millpond.provider")

#: Statuses by which the request itself is refused: no other provider is asked.
_OWN_FAULT = frozenset({400, 413, 422})
#: Seconds by which a timer may fire early.
_EARLY = 0.01


class Attempt(TypedDict):
    """One call to a provider; `outcome` is `ok`, `cancelled`, or its error's code; `simulated` is there if true."""

    provider: str
    model: str
    outcome: str
    duration_ms: int
    simulated: NotRequired[bool]


@dataclass(frozen=True, slots=True)
class Route:
    """One item of a chain. `name` is as configured; `model` None asks for the request's own."""

    name: str
    provider: Provider
    model: str | None = None
    #: an application's function: run once, with nothing between
    resolver: bool = False
    #: no model is called, whatever it is named
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """A completion, where it came from, and the model that was really asked."""

    completion: Completion
    provider: str
    model: str


class Chains:
    """The chains of all profiles; providers are shared between them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._providers: dict[str, Provider] = {}
        self._chains: dict[str, tuple[Route, ...]] = {}

    def of(self, profile: str) -> tuple[Route, ...]:
        """Return a profile's chain; one that this process does not know has the deployment's own provider.

        Raises:
            ConfigError: it names a provider that there is not, or a resolver that cannot be imported.
        """
        if profile not in self._chains:
            self._chains[profile] = self._built(profile)
        return self._chains[profile]

    def check(self) -> None:
        """Build every chain now, so that what is wrong is said at start.

        Raises:
            ConfigError: naming the profile and the setting.
        """
        for profile in self._settings.all_profiles:
            self.of(profile)

    async def close(self) -> None:
        """Give up all connections. Safe to call twice."""
        for provider in self._providers.values():
            await provider.close()

    def _built(self, profile: str) -> tuple[Route, ...]:
        about = self._settings.all_profiles.get(profile)
        if about is not None and about.resolver is not None:
            if about.providers:
                raise ConfigError(
                    f"profile {profile!r} has both providers and a resolver: keep one of them",
                    field=f"profiles.{profile}.resolver",
                )
            name = f"resolver:{about.resolver}"
            if name not in self._providers:
                self._providers[name] = ResolverProvider(about.resolver, profile, self._settings.concurrency)
            return (Route(name, self._providers[name], resolver=True),)
        items = (about.providers if about is not None else ()) or (self._settings.provider_name,)
        return tuple(self._route(profile, item) for item in items)

    def _route(self, profile: str, item: str) -> Route:
        name, _, model = item.partition(":")
        if name not in self._providers:
            try:
                self._providers[name] = EmbeddingBatches(make_provider(self._settings, name))
            except ConfigError as error:
                raise ConfigError(
                    f"profile {profile!r}, providers, {item!r}: {error.message}", field=f"profiles.{profile}.providers"
                ) from error
        simulated = self._settings.kind_of(name or self._settings.provider_name) == "simulated"
        return Route(item, self._providers[name], model or None, simulated=simulated)


async def ask(
    routes: Sequence[Route],
    endpoint: str,
    body: Mapping[str, Any],
    settings: Settings,
    *,
    breaker: Breaker | None = None,
    limits: RateLimits | None = None,
    attempts: list[Attempt] | None = None,
) -> Answered:
    """Ask a chain; `body` has its model. What was tried is appended to `attempts`, also when it is cancelled.

    Raises:
        ProviderError: nobody answered: the last error of a provider that was called, else that none may be.
    """
    loop, tried = asyncio.get_running_loop(), attempts if attempts is not None else []
    deadline = loop.time() + settings.total_timeout
    failed: ProviderError | None = None
    for at, route in enumerate(routes):
        left = (deadline - loop.time()) / (len(routes) - at)
        if at and left <= 0:
            break
        model = route.model or str(body["model"])
        try:
            asking = _Asking(route, model, Call(endpoint, {**body, "model": model}), settings, breaker, limits, tried)
            return Answered(await asking.run(left), route.name, model)
        except ProviderError as error:
            if failed is None or isinstance(failed, CircuitOpen) or not isinstance(error, CircuitOpen):
                failed = error
            if isinstance(error, ContentFiltered) or error.status in _OWN_FAULT:
                break
            log.debug("%s: %s", route.name, error.message)
    assert failed is not None  # noqa: S101 (a chain has at least one item)
    raise failed


@dataclass(slots=True)
class _Asking:
    """One request at one provider: its attempts, with the pool's limits and the circuit around each."""

    route: Route
    model: str
    call: Call
    settings: Settings
    breaker: Breaker | None
    limits: RateLimits | None
    attempts: list[Attempt]

    async def run(self, total: float) -> Completion:
        if self.route.resolver:
            return await within(total, self._called, self.route.name, "MILLPOND_TOTAL_TIMEOUT")
        return await with_retries(
            self._attempt,
            self.settings,
            provider=self.route.name,
            total_timeout=total,
            admit=self._admit if self.limits is not None and self.limits.active else None,
        )

    async def _admit(self) -> None:
        assert self.limits is not None  # noqa: S101 (asked for only then)
        if self.breaker is not None:
            await self.breaker.look(self._circuit)
        tokens, provider = estimate_tokens(self.call.body, self.call.endpoint), self.route.provider
        if isinstance(provider, EmbeddingBatches):
            await provider.admit(self.call, tokens, self._acquire)
        else:
            await self._acquire([Place(tokens)])

    async def _acquire(self, places: Sequence[Place]) -> None:
        assert self.limits is not None  # noqa: S101 (asked for only then)
        while True:
            try:
                return await self.limits.acquire_together(places)
            except Unavailable:
                await asyncio.sleep(0.2)

    async def _attempt(self, timeout: float) -> Completion:
        if self.breaker is None:
            return await self._called(timeout)
        turn = await self.breaker.ask(self._circuit)
        try:
            completion = await self._called(timeout)
        except ProviderError as error:
            await self.breaker.tell(self._circuit, turn, error)
            raise
        except BaseException:  # cut by its time-out, which cancels it, or given up with its flight
            self.breaker.give_up(self._circuit, turn, ill=self.attempts[-1]["outcome"] == ProviderTimeout.code)
            raise
        await self.breaker.tell(self._circuit, turn, None)
        return completion

    async def _called(self, timeout: float) -> Completion:
        began, outcome = time.monotonic(), "cancelled"
        try:
            completion = await self.route.provider.complete(Call(self.call.endpoint, self.call.body, timeout))
            outcome = "ok"
            return completion
        except MillpondError as error:
            outcome = error.code
            raise
        except Exception as error:
            log.exception("%s failed unexpectedly", self.route.name)
            outcome = ProviderError.code
            raise ProviderError(f"unexpected {type(error).__name__}: {error}", provider=self.route.name) from error
        finally:
            spent = time.monotonic() - began
            if outcome == "cancelled" and spent > timeout - _EARLY:
                outcome = ProviderTimeout.code
            attempt: Attempt = {
                "provider": self.route.name,
                "model": self.model,
                "outcome": outcome,
                "duration_ms": int(spent * 1000),
            }
            if self.route.simulated:
                attempt["simulated"] = True
            self.attempts.append(attempt)

    @property
    def _circuit(self) -> str:
        return f"{self.route.provider.name}:{self.model}"
