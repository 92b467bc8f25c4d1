"""A small model of L1, L2, flights and invalidations: what the real tiers should answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.messages import Question


@dataclass
class Flight:
    """The model's flight: which call computes it, what it began after, who waits."""

    number: int
    tenant: str
    key: str
    began: int
    tags: set[str]
    store: bool
    ttl_ms: int
    waiters: list[str] = field(default_factory=list)


@dataclass
class Stored:
    """The model's entry."""

    number: int
    key: str
    began: int
    tags: set[str]
    created_ms: int
    expires_ms: int


class Model:
    """What should be: the newest mark of each tag, the stored answers, the flights one may join."""

    def __init__(self) -> None:
        self.clock = 0
        self.marks: dict[str, int] = {}
        self.stored: dict[str, Stored] = {}
        self.flights: dict[str, Flight] = {}

    def invalidate(self, tags: set[str]) -> None:
        """Mark."""
        self.clock += 1
        self.marks |= dict.fromkeys(tags, self.clock)

    def valid(self, began: int, key: str, tags: set[str]) -> bool:
        """Whether nothing of this was invalidated since."""
        return all(self.marks.get(tag, -1) <= began for tag in tags | {"all", f"key:{key}"})

    def hit(self, q: Question) -> Stored | None:
        """Return the entry that must answer, its age and expiry aside."""
        entry = self.stored.get(q.tenant) if q.reads else None
        return entry if entry and self.valid(entry.began, q.key, entry.tags | set(q.tags)) else None

    def aboard(self, q: Question, waiter: str, number: int) -> Flight:
        """Join the flight that is fit, or begin one that call `number` will compute."""
        flight = self.flights.get(q.tenant) if q.mode != "bypass" else None
        if flight is None or not self.valid(flight.began, q.key, flight.tags | set(q.tags)):
            flight = Flight(number, q.tenant, q.key, self.clock, set(q.tags), q.stores, q.ttl_ms)
            if q.mode != "bypass":
                self.flights[q.tenant] = flight
        flight.tags |= set(q.tags)
        flight.store |= q.stores
        flight.ttl_ms = min(flight.ttl_ms, q.ttl_ms)
        flight.waiters.append(waiter)
        return flight

    def land(self, flight: Flight, ending: str) -> str:
        """End a flight; return what its waiters are told about storing."""
        current = self.flights.get(flight.tenant) is flight
        if current:
            del self.flights[flight.tenant]
        if ending == "failed":
            return ending
        if not current:
            return "overtaken"
        if ending or not flight.store:
            return ending or "no-store"
        return "stored" if self.valid(flight.began, flight.key, flight.tags) else "invalidated"
