"""What a flight counts as in the statistics: who began it, who joined, who got a stored answer in its place."""

from __future__ import annotations

from collections.abc import Sequence

from shared.messages import Kind
from shared.outbox import JOINED, STRICT
from shared.touches import Touches
from workers.flight import Fill, Outcome


class Tally:
    """Counts the waiters of one consumer's flights, each once."""

    def __init__(self, touches: Touches) -> None:
        self._touches = touches

    def placated(self, fill: Fill, outcome: Outcome) -> None:
        """Count those who got a stored answer while their flight goes on."""
        self._count(fill, outcome, [w for w in outcome.waiters if _how(w) not in STRICT])

    def ended(
        self,
        fill: Fill,
        outcome: Outcome,
        placated: int,
        *,
        tokens: tuple[int, int] = (0, 0),
        cost: float | None = None,
        saved_ms: int = 0,
    ) -> None:
        """Count all others who got an answer, once this worker has settled the flight.

        `tokens`, `cost` and `saved_ms` are what the answer took: what everyone who joined has saved.
        """
        left = [w for at, w in enumerate(outcome.waiters) if at >= placated or _how(w) in STRICT]
        self._count(fill, outcome, left, tokens=tokens, cost=cost, saved_ms=saved_ms)

    def _count(
        self,
        fill: Fill,
        outcome: Outcome,
        waiters: Sequence[bytes],
        *,
        tokens: tuple[int, int] = (0, 0),
        cost: float | None = None,
        saved_ms: int = 0,
    ) -> None:
        about, entry = fill.about, outcome.spare
        for waiter in waiters:
            # Each counts under its own variant: those of an experiment may ask the same.
            _, _, how, since, *named = waiter.split(b" ")
            experiment, variant = (*(name.decode() for name in named), None, None)[:2]
            kind = Kind(about["profile"], about["tenant"], fill.model, experiment, variant)
            latency_ms = max(0, outcome.now_ms - int(since))
            if entry is not None:
                if how in STRICT:
                    continue  # told the error
                self._touches.add(
                    "stale", kind, 1, latency_ms, tokens=entry.tokens, cost=entry.cost, saved_ms=entry.compute_ms
                )
            elif how in JOINED:
                self._touches.add("collapsed", kind, 1, latency_ms, tokens=tokens, cost=cost, saved_ms=saved_ms)
            else:
                self._touches.add("llm", kind, 1, latency_ms)


def _how(waiter: bytes) -> bytes:
    return waiter.split(b" ")[2]
