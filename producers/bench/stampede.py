"""Many identical requests at the same moment, from several processes, while the provider is slow to answer the first.

The provider counts its calls itself, in the simulated provider's journal.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson

from producers.bench import measure, questions
from producers.bench.measure import Show
from producers.bench.stage import Child, Stage
from shared.errors import MillpondError
from shared.providers.simulated import calls

#: Seconds until the provider answers: long enough for every request to arrive meanwhile.
FIRST_TOKEN = 2.0
_PATIENCE = 50.0

#: Does something while a flood is under way, given its question; returns what to report of it.
Meddle = Callable[[questions.Messages], Awaitable[dict[str, Any]]]


async def run(
    stage: Stage, show: Show, *, rounds: int = 5, requests: int = 10_000, producers: int = 4
) -> dict[str, Any]:
    """Measure on `stage` with two lookup and two LLM workers; every round asks a new question.

    `provider_calls` and `answered` are the worst of all rounds.
    """
    show("stampede: starting", 0.0)
    journal = stage.journal()
    for _ in range(2):
        await stage.worker("lookup")
        await llm_worker(stage, journal)
    crowd = [await stage.child("flood") for _ in range(producers)]
    asked = questions.distinct(rounds)
    found = []
    for number in range(rounds):
        show(f"stampede: round {number + 1} of {rounds}", (number + 0.5) / (rounds + 0.5))
        found.append(await flood(crowd, asked[number], requests, journal))
    return worst(found, requests, producers)


async def llm_worker(stage: Stage, journal: Path, **overrides: Any) -> Child:
    """Start an LLM worker with the slow provider."""
    return await stage.worker(
        "llm", simulated_first_token=FIRST_TOKEN, simulated_tokens_per_second=1e9, simulated_journal=journal,
        simulated_tokens=questions.ANSWER_TOKENS, **overrides,
    )  # fmt: skip


async def flood(
    crowd: list[Child], messages: questions.Messages, requests: int, journal: Path, meddle: Meddle | None = None
) -> dict[str, Any]:
    """Let every process of `crowd` ask at once; return what became of the requests of this round."""
    before, began = len(calls(journal)), perf_counter()
    for number, child in enumerate(crowd):
        share = requests // len(crowd) + (number < requests % len(crowd))
        child.tell(orjson.dumps({"messages": messages, "requests": share}).decode())
    told = await meddle(messages) if meddle else {}
    outcomes = await asyncio.gather(*(child.hear(_PATIENCE) for child in crowd))
    errors: Counter[str] = sum((Counter(one["errors"]) for one in outcomes), Counter())
    texts = {text for one in outcomes for text in one["texts"]}
    if len(texts) > 1:
        raise MillpondError(f"one question was given {len(texts)} different answers; this is a bug, please report it")
    return {
        "requests": requests,
        **{name: sum(one[name] for one in outcomes) for name in ("answered", "joined", "cached")},
        "errors": dict(errors),
        "provider_calls": len(calls(journal)) - before,
        "wall_s": round(perf_counter() - began, 3),
        **told,
    }


def worst(rounds: list[dict[str, Any]], requests: int, producers: int) -> dict[str, Any]:
    """Return a stampede's figures: counts of the worst round, never an average."""
    answered = min(one["answered"] for one in rounds)
    return {
        "requests": requests,
        "answered": answered,
        "unanswered": requests - answered,
        "provider_calls": max(one["provider_calls"] for one in rounds),
        "joined": min(one["joined"] for one in rounds),
        "wall_s": measure.summary([one["wall_s"] for one in rounds]),
        "provider_delay_s": FIRST_TOKEN,
        "producers": producers,
        "rounds": rounds,
    }
