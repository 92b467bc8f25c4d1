"""Registered resolvers: a function of the application's that the LLM pool runs for a miss, instead of a provider.

`module:function`, found on the import path or in the current directory. It is given the request's body (a dict) and
returns any JSON value, bytes, or a NumPy array. A plain function runs in a thread; one that never returns cannot be
interrupted, only left behind.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, InvalidRequest, ProviderError
from shared.providers.base import Call, Completion
from shared.values import encode


def load_resolver(spec: str, profile: str) -> Callable[[dict[str, Any]], Any]:
    """Import a resolver, `module:function`, of a profile.

    Raises:
        ConfigError: it cannot be imported, or is nothing that can be called.
    """
    module, _, name = spec.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever an application's module raises as it is imported
        raise ConfigError(
            f"the resolver {spec!r} of profile {profile!r} cannot be imported ({type(error).__name__}: {error}); it is "
            "looked for on the import path and in the current directory",
            field=f"profiles.{profile}.resolver",
        ) from error
    if not callable(found):
        raise ConfigError(
            f"the resolver {spec!r} of profile {profile!r} is no function", field=f"profiles.{profile}.resolver"
        )
    return found  # type: ignore[no-any-return]


class ResolverProvider:
    """A resolver in a provider's place. At most `threads` of a plain function run at once."""

    def __init__(self, spec: str, profile: str, threads: int) -> None:
        self.name = f"resolver:{spec}"
        self._resolve = load_resolver(spec, profile)
        plain = not inspect.iscoroutinefunction(self._resolve)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="resolver") if plain else None

    async def complete(self, call: Call) -> Completion:
        """Run the function on the call's body.

        Raises:
            ProviderError: it raised, or returned what cannot be stored.
        """
        try:
            if self._threads is not None:
                value = await asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, call.body)
            else:
                value = await self._resolve(call.body)
        except ProviderError as error:
            error.provider = error.provider or self.name
            raise
        except Exception as error:
            raise ProviderError(f"{self.name} raised {type(error).__name__}: {error}", provider=self.name) from error
        try:
            encoded = encode(value)
        except InvalidRequest as error:
            raise ProviderError(f"{self.name}: {error.message}", provider=self.name) from error
        return Completion(encoded.data, 0, 0, encoded.about, judged=True)

    async def close(self) -> None:
        """Start nothing more; what runs in a thread runs on."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
