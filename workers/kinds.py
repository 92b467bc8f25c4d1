"""The kinds of workers there are, and what each of them needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import StrEnum
from importlib import import_module
from typing import cast

from shared.settings import Settings

Run = Callable[[Settings, asyncio.Event, Callable[[str], None]], Awaitable[None]]


class Kind(StrEnum):
    """A kind of worker; the module of that name in `workers` has its `run`."""

    lookup = "lookup"
    llm = "llm"
    persistence = "persistence"
    promotion = "promotion"
    invalidation = "invalidation"
    schedule = "schedule"

    @property
    def needs_database(self) -> bool:
        """Whether it has nothing to do without PostgreSQL."""
        return self in (Kind.persistence, Kind.promotion)

    @property
    def run(self) -> Run:
        """Its `run(settings, stop, on_ready)`; the module is loaded at first use."""
        return cast(Run, import_module(f"workers.{self.value}").run)


#: What goes on after a reply went out; `millpond up` runs one of each.
BACKGROUND = tuple(kind for kind in Kind if kind not in (Kind.lookup, Kind.llm))
