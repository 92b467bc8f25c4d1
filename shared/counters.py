"""Counters of what the workers did, added up in Redis once a second."""

from __future__ import annotations

from collections import defaultdict

from shared import keys
from shared.link import Command


class Counters:
    """Counts of one process since its last flush; the hash `mp:stats` has the sum of all."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, count: int = 1) -> None:
        """Count `count` more."""
        self._counts[name] += count

    def take(self) -> dict[str, int]:
        """Return and reset what was counted since the last call."""
        taken, self._counts = dict(self._counts), defaultdict(int)
        return taken

    def put_back(self, taken: dict[str, int]) -> None:
        """Count again what could not be added to the sum."""
        for name, count in taken.items():
            self._counts[name] += count

    @staticmethod
    def commands(taken: dict[str, int]) -> list[Command]:
        """Return the commands that add `taken` to the deployment's sum."""
        return [("HINCRBY", keys.STATS, name, count) for name, count in taken.items() if count]
