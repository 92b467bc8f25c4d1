"""What clients and the provider saw, in the one order in which they saw it, and what must hold of that.

Everything is judged from outside. The provider (or the application that computes a value) numbers its computations, and
an answer is nothing but such a number: it names the computation that made it. Clients and provider live in one process,
so their moments compare exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from workers.sweep import epoch_of

CACHED = ("l1", "l2", "l3")


@dataclass(slots=True)
class Computation:
    """One call of the provider, or one value computed by an application; `ended` is None while it runs."""

    number: int
    begun: int
    ended: int | None = None


@dataclass(slots=True)
class Invalidation:
    """One that was acknowledged. `ids` are those of the partitions' logs."""

    labels: frozenset[str]
    begun: int
    returned: int
    ids: dict[int, str]

    def concerns(self, ask: Ask) -> bool:
        """Whether it names anything that the request, or its answer, is invalidated by."""
        wanted = ask.labels | {"all", f"key:{ask.key}"}
        prefixes = tuple(label[7:] for label in self.labels if label.startswith("prefix:"))
        return bool(self.labels & wanted) or any(label.startswith(prefixes) for label in ask.labels if prefixes)


@dataclass(slots=True)
class Ask:
    """One request and its outcome: the computation that its answer names, or the error."""

    key: str
    partition: int
    labels: frozenset[str]
    begun: int
    returned: int | None = None
    number: int | None = None
    tier: str = ""
    stored: bool = False
    epoch: str = "0-0"
    error: str = ""


@dataclass(slots=True)
class History:
    """All that was seen."""

    computations: dict[int, Computation] = field(default_factory=dict)
    invalidations: list[Invalidation] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    _moments: Iterator[int] = field(default_factory=count)

    def now(self) -> int:
        """Return this moment; each is later than the one before."""
        return next(self._moments)

    def compute(self) -> Computation:
        """Begin a computation."""
        begun = Computation(len(self.computations) + 1, self.now())
        self.computations[begun.number] = begun
        return begun

    def violations(self) -> list[str]:
        """Return everything that must not have happened, I3, I4 and I7, and what nobody was told (I2)."""
        found = [problem for ask in self.asks for problem in self._of_one(ask)]
        return [*found, *self._regressions()]

    def _of_one(self, ask: Ask) -> Iterator[str]:
        what = f"{ask.key[:8]} asked at {ask.begun} ({ask.tier}, computation {ask.number}, epoch {ask.epoch})"
        if ask.returned is None or ask.error:
            yield f"I2: {what} had no answer: {ask.error or 'nothing at all'}"
            return
        made = self.computations.get(ask.number or 0)
        if made is None:
            yield f"{what} was answered with what nobody computed"
            return
        for one in self.invalidations:
            if not one.concerns(ask):
                continue
            when = f"an invalidation of {sorted(one.labels)} ({one.begun} to {one.returned}, {one.ids[ask.partition]})"
            if one.returned < ask.begun and made.begun < one.begun:
                yield f"I3: {what} got a computation begun at {made.begun}, before {when}"
            elif one.returned < ask.begun and epoch_of(ask.epoch) < epoch_of(one.ids[ask.partition]):
                yield f"I3: {what} got a flight that began before {when}"
            elif ask.tier not in CACHED and ask.stored and made.begun < one.begun and _before(one.returned, made.ended):
                yield f"I4: {what} was stored, although overtaken by {when}"

    def _regressions(self) -> Iterator[str]:
        """Yield each answer from a tier that is older than one stored before, where nothing voids that one.

        An answer counts as stored once a client was told so. What was asked with further labels has an order of its
        own: it may have been answered past what is stored.
        """
        by_question: dict[tuple[str, frozenset[str]], list[Ask]] = {}
        for ask in self.asks:
            if ask.stored and ask.returned is not None and not ask.error:
                by_question.setdefault((ask.key, ask.labels), []).append(ask)
        for asks in by_question.values():
            for ask in asks:
                older = (one for one in asks if one.returned is not None and one.returned < ask.begun)
                newest = max(older, key=lambda one: epoch_of(one.epoch), default=None)
                if ask.tier in CACHED and newest and epoch_of(ask.epoch) < epoch_of(newest.epoch):
                    if any(one.concerns(newest) and one.returned > newest.begun for one in self.invalidations):
                        continue
                    yield (
                        f"I7: {ask.key[:8]} asked at {ask.begun} got epoch {ask.epoch} from {ask.tier}, "
                        f"after {newest.epoch} had been stored at {newest.returned}"
                    )

    def tiers(self) -> dict[str, int]:
        """Return how many answers came from where."""
        tiers = [ask.tier for ask in self.asks if ask.returned is not None]
        return {tier: tiers.count(tier) for tier in sorted(set(tiers))}


def _before(moment: int, ended: int | None) -> bool:
    return ended is not None and moment < ended


def first(problems: Iterable[str], most: int = 8) -> str:
    """Return the first few problems, for a failing test to show."""
    return "\n".join(list(problems)[:most])
