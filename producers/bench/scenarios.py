"""The three scenarios this project began with, on real processes and PostgreSQL, with a simulated provider.

Of each: what was claimed for it elsewhere, what is measured here, and the ratio of the two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from time import perf_counter
from typing import Any

from producers.bench import measure, memory, miss, questions, workflows
from producers.bench.measure import Show, rounded_percentile
from producers.bench.questions import Messages
from producers.bench.stage import Child, Stage
from producers.client import Client
from producers.replay.make_demo import build
from producers.reply import Reply
from shared.errors import MillpondError, Unavailable
from shared.keys import PartitionKeys
from shared.link import Link
from shared.providers.simulated import calls

_CACHED = ("l1", "l2", "l3")
#: Tokens of simulated answers that come to about 5 KB of text.
_TOKENS = 1090
#: How many times faster than they were written the users' questions are asked.
_FASTER = 4.0
#: Seconds to wait for the persistence worker to have written everything.
_WRITTEN = 30.0


@dataclass(frozen=True, slots=True)
class Claim:
    """One figure. `less`: at most what is claimed, else at least. `due` is False where a tier is still to come."""

    scenario: str
    what: str
    field: str
    claim: float
    measured: float
    less: bool = True
    unit: str = ""
    due: bool = True

    @property
    def kept(self) -> bool:
        """Whether the measured figure keeps the claim."""
        return self.measured <= self.claim if self.less else self.measured >= self.claim

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON, with `ratio` = measured / claim and `kept`."""
        return asdict(self) | {"ratio": round(self.measured / self.claim, 4), "kept": self.kept}


@dataclass(slots=True)
class Seen:
    """Replies of one phase: how long they took (ms) by tier, and what their answers would have cost."""

    took: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    keys: list[str] = field(default_factory=list)
    tokens: int = 0
    spent: int = 0

    async def ask(self, client: Client, messages: Messages, tags: Sequence[str] = ()) -> Reply:
        """Ask, and note how it went."""
        began = perf_counter()
        reply = await client.ask(messages=messages, tags=tags)
        tier = "joined" if reply.collapsed else reply.tier
        self.took[tier].append((perf_counter() - began) * 1000)
        used = int(reply.body["usage"]["total_tokens"])
        self.tokens += used
        self.spent += used if tier == "llm" else 0
        self.keys.append(reply.key)
        return reply

    @property
    def cached(self) -> list[float]:
        """Of all tiers together."""
        return [ms for tier in _CACHED for ms in self.took[tier]]

    @property
    def count(self) -> int:
        """How many were asked."""
        return sum(map(len, self.took.values()))

    def counts(self) -> dict[str, int]:
        """Return how many were answered from where."""
        return {tier: len(took) for tier, took in sorted(self.took.items())}


async def run(
    stage: Stage,
    show: Show,
    *,
    conversations: int = 300,
    at_once: int = 8,
    samples: int = 300,
    seconds: float = 14.6,
    burst_requests: int = 1000,
    users_requests: int = 2000,
    misses: int = 100,
    answers: int = 2000,
) -> dict[str, Any]:
    """Play the scenarios on `stage`, one after the other, each on an empty server with workers of its own."""
    show("scenarios: lead qualification", 0.0)
    leads = await _timed(_leads(stage, show, conversations, at_once, samples))
    show("scenarios: the same questions", 0.45)
    same = await _timed(_same_questions(stage, burst_requests, seconds))
    show("scenarios: a hundred users", 0.75)
    users = await _timed(_hundred_users(stage, show, users_requests, misses, answers))
    claims = [*_of_leads(leads), *_of_same(same), *_of_users(users)]
    return {
        "claims": [claim.as_dict() for claim in claims],
        "due": sum(claim.due for claim in claims),
        "kept": sum(claim.kept and claim.due for claim in claims),
        "leads": leads,
        "same_questions": same,
        "users": users,
    }


async def _timed(scenario: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    began = perf_counter()
    return await scenario | {"seconds": round(perf_counter() - began, 1)}


# lead qualification


async def _leads(stage: Stage, show: Show, conversations: int, at_once: int, samples: int) -> dict[str, Any]:
    texts, seen, journal = workflows.Texts(), Seen(), stage.journal()
    async with _crew(stage, database_url=await stage.database()) as crew:
        await crew.begin("persistence")
        await crew.begin("llm", simulated_first_token=0.05, simulated_tokens_per_second=1e9, simulated_journal=journal)
        await crew.begin("lookup")
        async with Client(stage.url, settings=stage.settings()) as client:
            numbers = iter(range(conversations))

            async def converse() -> None:
                for number in numbers:
                    show(f"scenarios: conversation {number + 1}", 0.3 * number / conversations)
                    for step in workflows.workflow(number, texts):
                        await seen.ask(client, step.messages, step.tags)

            await asyncio.gather(*(converse() for _ in range(at_once)))
            called = len(calls(journal))
            tiers = await _tiers(stage, crew, client, texts, min(samples, conversations))
    return {
        "conversations": conversations,
        "steps": workflows.STEPS,
        "requests": seen.count,
        "provider_calls": called,
        "answered_from": seen.counts(),
        "hit_rate": round(len(seen.cached) / seen.count, 4),
        "tokens_without": round(seen.tokens / conversations),
        "tokens_with": round(seen.spent / conversations),
        "cached_p95_ms": rounded_percentile(seen.cached, 0.95),
        **{f"{tier}_p50_ms": rounded_percentile(took, 0.5) for tier, took in tiers.items()},
        "samples_per_tier": len(tiers["l1"]),
    }


async def _tiers(
    stage: Stage, crew: Crew, client: Client, texts: workflows.Texts, samples: int
) -> dict[str, list[float]]:
    """Ask again what was answered before, one at a time, of each tier in turn; return how long each took (ms)."""
    own = [step for number in range(samples) for step in workflows.workflow(number, texts) if step.own][-samples:]
    link = Link(stage.url, name="millpond-bench")
    found = {}
    try:
        await _written(link)
        await crew.anew("lookup")  # whose L1 is empty: what it finds in L2 the first time, it finds in L1 the second
        for tier in ("l2", "l1"):
            found[tier], keys = await _asked_again(client, own, tier)
        # They leave Redis, as what is not asked again does at the end of its probation.
        await link.call(("UNLINK", *(PartitionKeys(0).entry(key) for key in keys)))
        await crew.anew("lookup")
        found["l3"], _ = await _asked_again(client, own, "l3")
    finally:
        await link.close()
    return found


async def _asked_again(client: Client, steps: list[workflows.Step], tier: str) -> tuple[list[float], list[str]]:
    seen = Seen()
    for step in steps:
        await seen.ask(client, step.messages, step.tags)
    took = seen.took[tier]
    if len(took) < 0.9 * len(steps):
        raise MillpondError(f"{len(steps)} answers were to come from {tier}; they came from {seen.counts()}")
    return took, seen.keys


async def _written(link: Link) -> None:
    """Wait until everything that landed is in PostgreSQL."""
    deadline = perf_counter() + _WRITTEN
    while await link.call(("XLEN", PartitionKeys(0).landed)):
        if perf_counter() > deadline:
            raise Unavailable(f"the persistence worker had not written everything after {_WRITTEN:g} s")
        await asyncio.sleep(0.05)


def _of_leads(found: dict[str, Any]) -> list[Claim]:
    name = "lead qualification"
    return [
        Claim(name, "tokens per workflow (93,000 without a cache)", "tokens_with", 7800, found["tokens_with"]),
        Claim(name, "hit rate", "hit_rate", 0.85, found["hit_rate"], less=False),
        Claim(name, f"cached p95, {found['steps']} steps of 5,000 tokens", "cached_p95_ms", 200,
              found["cached_p95_ms"], unit="ms"),
        *(
            Claim(name, f"{tier.upper()} median", f"{tier}_p50_ms", claim, found[f"{tier}_p50_ms"], unit="ms")
            for tier, claim in (("l1", 1), ("l2", 5), ("l3", 20))
        ),
    ]  # fmt: skip


# the same questions


async def _same_questions(stage: Stage, requests: int, seconds: float) -> dict[str, Any]:
    """Ask five questions over and over, ten at a time: the first ten are two of each."""
    journal, seen, distinct, at_once = stage.journal(), Seen(), 5, 10
    asked = questions.distinct(distinct)
    async with _crew(stage) as crew:
        for _ in range(2):
            await crew.begin(
                "llm", simulated_first_token=seconds, simulated_tokens_per_second=1e9, simulated_journal=journal
            )
            await crew.begin("lookup")
        async with Client(stage.url, settings=stage.settings()) as client:
            took = await measure.latencies(
                lambda number: seen.ask(client, asked[number % distinct]), requests, concurrency=at_once
            )
    return {
        "requests": requests,
        "at_once": at_once,
        "distinct": distinct,
        "provider_seconds": seconds,
        "answered_from": seen.counts(),
        "hit_rate": round(len(seen.cached) / requests, 4),
        "mean_s": round(fmean(took) / 1000, 4),
        "provider_calls": len(calls(journal)),
        "calls_per_question": round(len(calls(journal)) / distinct, 3),
    }


def _of_same(found: dict[str, Any]) -> list[Claim]:
    name = f"same questions, {found['provider_seconds']:g} s LLM"
    return [
        Claim(name, "hit rate", "hit_rate", 0.95, found["hit_rate"], less=False),
        Claim(name, "average answer", "mean_s", 1, found["mean_s"], unit="s"),
        Claim(name, "provider calls per distinct question", "calls_per_question", 1, found["calls_per_question"]),
    ]


# a hundred users


async def _hundred_users(stage: Stage, show: Show, requests: int, misses: int, answers: int) -> dict[str, Any]:
    """Let users ask the demo's questions (40 % repeated, 30 % reworded, 30 % new); then misses, then memory.

    The questions come at the demo's own moments, four times as fast, from whichever of the hundred users is free.
    """
    journal, seen, users = stage.journal(), Seen(), 100
    fast = {"simulated_tokens_per_second": 1e9, "simulated_tokens": _TOKENS, "simulated_journal": journal}
    rows = build(requests)
    link = Link(stage.url, name="millpond-bench")
    try:
        async with _crew(stage) as crew:
            await crew.begin("lookup")
            await crew.begin("llm", simulated_first_token=0.2, **fast)
            async with Client(stage.url, settings=stage.settings()) as client:
                began = perf_counter()

                async def ask_when_due(number: int) -> None:
                    await asyncio.sleep(max(0.0, began + rows[number]["at"] / _FASTER - perf_counter()))
                    await seen.ask(client, rows[number]["body"]["messages"])

                await measure.latencies(ask_when_due, requests, concurrency=users)
                await crew.anew("llm", simulated_first_token=miss.PROVIDER_DELAY, **fast)
                fresh = questions.distinct(requests + misses + answers)[requests:]  # none that the users asked
                added = await miss.added(client, fresh[:misses], journal)
                show("scenarios: memory", 0.85)
                used = await _memory(link, client, fresh[misses:])
    finally:
        await link.close()
    return {
        "users": users,
        "requests": requests,
        "answered_from": seen.counts(),
        "hit_rate": round(len(seen.cached) / requests, 4),
        "without_a_call": round(1 - len(seen.took["llm"]) / requests, 4),
        "cached_p50_ms": rounded_percentile(seen.cached, 0.5),
        "cached_p95_ms": rounded_percentile(seen.cached, 0.95),
        "miss_added_p50_ms": rounded_percentile(added, 0.5),
        "misses": misses,
        "answers": answers,
        "memory_mb": round(used / 1e6 * 10_000 / answers, 2),
    }


async def _memory(link: Link, client: Client, asked: list[Messages]) -> int:
    """Return by how many bytes Redis grows with an answer to each question."""
    before = await memory.settled(link)
    await questions.answer_all(client, asked)
    return await memory.settled(link) - before


def _of_users(found: dict[str, Any]) -> list[Claim]:
    name, memory_of = "100 users, 40/30/30", f"Redis memory of 10,000 answers of 5 KB text (by {found['answers']:,})"
    exact = "hit rate, exact matches only (30 % are reworded)"
    return [
        Claim(name, exact, "hit_rate", 0.60, found["hit_rate"], less=False, due=False),
        Claim(name, "cached p95", "cached_p95_ms", 100, found["cached_p95_ms"], unit="ms"),
        Claim(name, "added by a miss, median", "miss_added_p50_ms", 5, found["miss_added_p50_ms"], unit="ms"),
        Claim(name, memory_of, "memory_mb", 100, found["memory_mb"], unit="MB"),
    ]


# workers


class Crew:
    """The workers of one scenario, by kind."""

    def __init__(self, stage: Stage, shared: dict[str, Any]) -> None:
        self._stage = stage
        self._shared = shared
        self._children: dict[str, list[Child]] = defaultdict(list)

    async def begin(self, kind: str, **overrides: Any) -> None:
        """Start one more."""
        self._children[kind].append(await self._stage.worker(kind, **self._shared, **overrides))

    async def anew(self, kind: str, **overrides: Any) -> None:
        """End all of that kind and start one."""
        for child in self._children.pop(kind, []):
            child.close()
        await self.begin(kind, **overrides)

    def end(self) -> None:
        """End all."""
        for children in self._children.values():
            for child in children:
                child.close()


@contextlib.asynccontextmanager
async def _crew(stage: Stage, **shared: Any) -> AsyncIterator[Crew]:
    crew = Crew(stage, shared)
    try:
        yield crew
    finally:
        crew.end()
        await stage.wipe()
