"""An application's function that goes on when it is told to, and who asks for its value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from millpond import Client
from tests.application import ARGS, PROFILE
from tests.faults_support import Pond

LEASE = 1.0


@pytest.fixture(autouse=True)
def quick(pond: Pond) -> None:
    """A short lease, and a profile whose waiters compute when their leader raises."""
    pond.options |= {"compute_lease": LEASE, "profiles": {"stubborn": {"on_error": "elect"}}}
    pond.settings = pond.with_()


class Mill:
    """An application's function: counts its runs, and goes on only when it is told to."""

    def __init__(self, value: Any = "flour") -> None:
        self.value = value
        self.runs = 0
        self.running = 0
        self.most = 0
        self.go = asyncio.Event()

    async def __call__(self) -> Any:
        """Grind."""
        self.runs += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


def asking(client: Client, mill: Callable[[], Any], profile: str = PROFILE, **how: Any) -> asyncio.Task[Any]:
    """Ask for it, in a task of its own."""
    how.setdefault("timeout", 20)
    return asyncio.create_task(client.get_or_compute(profile, ARGS, mill, **how))


def aboard(pond: Pond) -> int:
    """Return how many others wait for a flight."""
    return sum(int(pond.redis.execute_command("LLEN", name)) for name in pond.found("{mp:*}:waiters:*"))
