"""What became of every request of a run, in columns; a hundred thousand of them cost a few megabytes."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any, Protocol

from shared.answers import usage_of

COALESCED = "coalesced"
LLM = "llm"
#: Ways to an answer, in the order in which a request tries them; also the order in tables and plots.
WAYS = ("l1", "l2", "semantic", "l3", COALESCED, LLM)
ERROR = "error:"
#: What the simulated provider puts before the model's name in its answers.
SIMULATED = "simulated/"


class Answer(Protocol):
    """What a run needs to know of a reply."""

    @property
    def tier(self) -> str:
        """`l1`, `l2`, …, or `llm` when it was computed for this request."""

    @property
    def collapsed(self) -> bool:
        """Whether the request joined a flight that another one began."""

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens as the provider counted them when the answer was computed."""

    @property
    def model(self) -> str:
        """The model asked, by which the answer is priced."""

    @property
    def body(self) -> dict[str, Any]:
        """The provider's own JSON; its `model` tells a simulated answer."""


Usage = tuple[str, int, int]
"""Model, prompt tokens, completion tokens of one call."""


class Recorder:
    """Collects outcomes: when each request was due (seconds from the start), how long it took, by which way.

    `way` is one of `WAYS` or another tier, or `error:` and the code of the error. `spent` counts the calls that were
    paid for (`simulated` of them made up), `saved` those that were not; `lag` is how late the driver itself was in
    sending a request, in seconds.
    """

    def __init__(self) -> None:
        self.due = array("d")
        self.latency = array("d")
        self.ways = array("H")
        self.lag = array("d")
        self.names: list[str] = []
        self.counts: Counter[str] = Counter()
        self.messages: dict[str, str] = {}
        self.spent: Counter[Usage] = Counter()
        self.saved: Counter[Usage] = Counter()
        self.simulated = 0
        self.wall = 0.0
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.due)

    def answered(self, due: float, latency: float, reply: Answer) -> None:
        """Record an answer. Only the request that began the flight paid for it."""
        self._add(due, latency, COALESCED if reply.collapsed else reply.tier)
        call = (reply.model, *usage_of({"usage": reply.usage}))
        if reply.tier == LLM and not reply.collapsed:
            self.spent[call] += 1
            self.simulated += str(reply.body.get("model", "")).startswith(SIMULATED)
        else:
            self.saved[call] += 1

    def failed(self, due: float, latency: float, code: str, message: str) -> None:
        """Record an error by its code; the first message of each code is kept in `messages`."""
        self.messages.setdefault(code, message)
        self._add(due, latency, ERROR + code)

    def _add(self, due: float, latency: float, way: str) -> None:
        number = self._numbers.get(way)
        if number is None:
            number = self._numbers[way] = len(self.names)
            self.names.append(way)
        self.due.append(due)
        self.latency.append(latency)
        self.ways.append(number)
        self.counts[way] += 1

    def latencies(self) -> dict[str, list[float]]:
        """Return the latencies in seconds by way, each list sorted."""
        found: dict[str, list[float]] = {name: [] for name in self.names}
        lists = [found[name] for name in self.names]
        for way, latency in zip(self.ways, self.latency, strict=True):
            lists[way].append(latency)
        for values in found.values():
            values.sort()
        return found

    @property
    def errors(self) -> dict[str, int]:
        """How many requests failed, by error code."""
        return {way.removeprefix(ERROR): n for way, n in self.counts.items() if way.startswith(ERROR)}


def in_order(ways: list[str]) -> list[str]:
    """Return ways to an answer in the order of `WAYS`, unknown tiers before `coalesced`, errors left out."""
    place = {way: i for i, way in enumerate(WAYS)}
    return sorted((w for w in ways if not w.startswith(ERROR)), key=lambda way: (place.get(way, 3.5), way))
