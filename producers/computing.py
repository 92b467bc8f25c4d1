"""Compute once, for everyone who asks, in whichever process: `get_or_compute`, and the same as a decorator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from producers import lead
from producers.cached import Decorator, Recipe
from producers.lead import Grant, Leader
from producers.reply import Reply
from producers.store import Store
from shared.errors import DeadlineExceeded


class Computing(Store):
    """Values that are computed when they are not there."""

    async def get_or_compute(
        self,
        profile: str,
        args: Any,
        function: Callable[[], Any] | None = None,
        *,
        tags: Sequence[str] = (),
        ttl: float | None = None,
        tenant: str | None = None,
        scope: Mapping[str, str] | None = None,
        max_age: float | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return the value for `args`: a stored one, or what one of those who ask at this moment computes for all.

            answers = await pond.get_or_compute("retrieval", {"query": q}, lambda: search(q), tags=["corpus:7"])

        `args`, a text or a list or an object, is all the value depends on. `function` takes no arguments and returns
        any JSON, bytes, or a NumPy array; a coroutine function is awaited, a plain one runs in a thread. It runs in
        one process at a time; the others wait. If it raises, it raises here, and the others get `ComputeError`, or
        (profile with `on_error = "elect"`) the next of them computes; as it does when this caller is cancelled, runs
        out of `timeout` seconds or dies. Where the profile keeps values for errors (`stale_if_error`), such a value is
        returned instead of the error, save to those who gave a `max_age`. Without `function` the
        profile's `resolver` computes, in the LLM pool.

        What is returned is what everyone gets: tuples become lists, for instance.

        Raises:
            ComputeError: the function of who computed for all raised; `.kind` names its exception.
            InvalidRequest: a field is wrong, or the value is of no kind that can be stored.
            DeadlineExceeded: no value within `timeout` seconds.
            Unavailable: no server could be reached.
            Exception: whatever `function` raised here.
        """
        directives = {
            "profile": profile, "tags": tags, "ttl": ttl, "tenant": tenant, "scope": scope, "max_age": max_age,
        }  # fmt: skip
        body = self._body(args)
        async with _within(self._wait(timeout)):
            outcome = await self._request(body, directives, timeout, lead=function is not None, knocks=True)
            if isinstance(outcome, Reply):
                return outcome.value
            assert function is not None  # noqa: S101 (nobody else is elected)
            if isinstance(outcome, Grant):
                return await self._lead(profile, outcome, function, strict=max_age is not None)
            assert self._fallback is not None  # noqa: S101 (only it says so)
            return await self._fallback.compute(body, self._encode_directives(directives), function)

    async def _lead(self, profile: str, grant: Grant, function: Callable[[], Any], *, strict: bool) -> Any:
        link, _ = await self._connected()
        known = self._rules.profiles.get(profile)
        leader = Leader(link, grant, self._settings)
        self._leading.add(leader)
        try:
            elect = known is not None and known.on_error == "elect"
            return await lead.compute(leader, function, elect=elect, strict=strict, finish=self._finish)
        finally:
            self._leading.discard(leader)

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
    ) -> Decorator:
        """Return a decorator: calls of the function go through `get_or_compute`; a plain function becomes awaitable.

            @pond.cached(profile="retrieval", key="{corpus}/{query}", tags=["corpus:{corpus}"])
            async def search(corpus: int, query: str) -> list[str]: ...

        `key` tells what a value depends on: a format string of the arguments, or a function of them that returns a
        text, a list or an object. Without one it is the function's own name and all its arguments by name. Two
        functions with one profile and equal keys share their values. Each of `tags` is a format string too, or all of
        them a function of the arguments. A method needs a `key`: its object is among its arguments.
        """
        ask = partial(self.get_or_compute, profile, ttl=ttl, tenant=tenant, scope=scope, timeout=timeout)
        return Decorator(ask, Recipe(key, tags))


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError:
        if not scope.expired():
            raise
        raise DeadlineExceeded(f"no value within {seconds:g} s: raise the timeout, or compute faster") from None
