"""The decorator `@client.cached(…)`: what a call's value depends on, read off its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, overload

from shared.errors import InvalidRequest

P = ParamSpec("P")
T = TypeVar("T")


class Recipe:
    """How the arguments of a call become what its value depends on, and its tags."""

    def __init__(
        self, key: str | Callable[..., Any] | None, tags: Sequence[str] | Callable[..., Sequence[str]]
    ) -> None:
        self._key = key
        self._tags = [tags] if isinstance(tags, str) else tags
        self._signatures: dict[Callable[..., Any], inspect.Signature] = {}

    def of(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[str]]:
        """Return what the value of this call depends on, and the tags it is invalidated by.

        Raises:
            TypeError: the function does not take these arguments.
            InvalidRequest: `key` or a tag names an argument that is not there.
        """
        if function not in self._signatures:
            self._signatures[function] = inspect.signature(function)
        bound = self._signatures[function].bind(*args, **kwargs)
        bound.apply_defaults()
        tags = self._tags
        marked = list(tags(*args, **kwargs)) if callable(tags) else [_filled(t, bound.arguments, "tags") for t in tags]
        if self._key is None:
            return {"function": f"{function.__module__}.{function.__qualname__}", "arguments": bound.arguments}, marked
        key = self._key(*args, **kwargs) if callable(self._key) else _filled(self._key, bound.arguments, "key")
        return key, marked


def _filled(template: str, arguments: Mapping[str, Any], field: str) -> str:
    try:
        return template.format_map(arguments)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise InvalidRequest(
            f"{field}: {template!r} cannot be filled from the arguments: {error!r}", field=field
        ) from None


class Decorator:
    """What `Client.cached` returns. Plain functions and coroutine functions both become coroutine functions.

    `get_or_compute` is the client's, with all that the recipe does not decide.
    """

    def __init__(self, get_or_compute: Callable[..., Awaitable[Any]], recipe: Recipe) -> None:
        self._get_or_compute = get_or_compute
        self._recipe = recipe

    @overload
    def __call__(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __call__(self, function: Callable[P, T]) -> Callable[P, Awaitable[T]]: ...
    def __call__(self, function: Callable[P, Any]) -> Callable[P, Awaitable[Any]]:
        """Return `function`, its values cached."""
        asynchronous = inspect.iscoroutinefunction(function)

        @wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            key, tags = self._recipe.of(function, args, kwargs)

            async def compute() -> Any:
                return await function(*args, **kwargs)

            work = compute if asynchronous else partial(function, *args, **kwargs)
            return await self._get_or_compute(args=key, function=work, tags=tags)

        return call


class BlockingDecorator:
    """What `BlockingClient.cached` returns: plain functions stay plain functions."""

    def __init__(self, get_or_compute: Callable[..., Any], recipe: Recipe) -> None:
        self._get_or_compute = get_or_compute
        self._recipe = recipe

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function`, its values cached."""

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            key, tags = self._recipe.of(function, args, kwargs)
            work = partial(function, *args, **kwargs)
            value: T = self._get_or_compute(args=key, function=work, tags=tags)
            return value

        return call
