"""What Millpond adds to a provider call: the time a miss takes at the client, less the provider's own.

The simulated provider measures its own time, from the call's arrival to its answer; the difference is all the rest:
publish, look up, join, fill, land, reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from producers.bench import measure, questions
from producers.bench.measure import Show, rounded_percentile
from producers.bench.stage import Stage
from producers.client import Client
from shared.errors import MillpondError
from shared.providers.base import Call
from shared.providers.simulated import calls, durations, fingerprint

PROVIDER_DELAY = 0.02
_MODEL = "gpt-4o-mini"


async def run(
    stage: Stage, show: Show, *, rounds: int = 5, count: int = 120, together: int = 16, count_together: int = 480
) -> dict[str, Any]:
    """Measure on `stage` with one lookup and one LLM worker: one miss at a time, and `together` at once, in turns."""
    show("miss: starting", 0.0)
    journal = stage.journal()
    await stage.worker(
        "llm", simulated_first_token=PROVIDER_DELAY, simulated_tokens_per_second=1e9,
        simulated_tokens=questions.ANSWER_TOKENS, simulated_journal=journal,
    )  # fmt: skip
    await stage.worker("lookup")
    asked = iter(questions.distinct(20 + rounds * (count + count_together)))
    alone: list[list[float]] = []
    crowd: list[list[float]] = []
    async with Client(stage.url, settings=stage.settings()) as client:
        await _misses(client, [next(asked) for _ in range(20)], 4)
        for number in range(rounds):
            show(f"miss: round {number + 1} of {rounds}", (number + 0.5) / (rounds + 0.5))
            for into, size, concurrency in ((alone, count, 1), (crowd, count_together, together)):
                took = await _misses(client, [next(asked) for _ in range(size)], concurrency)
                into.append(_added(took, journal))
    ours = calls(journal)
    return {
        **_figures("added", alone),
        **_figures(f"added_at_{together}", crowd),
        "provider_p50_ms": round(median(durations(journal).values()) * 1000, 3),
        "requests": 20 + rounds * (count + count_together),
        "provider_calls": len(ours),
        "rounds": [
            {
                "added_p50_ms": rounded_percentile(a, 0.5),
                "added_p95_ms": rounded_percentile(a, 0.95),
                f"added_at_{together}_p50_ms": rounded_percentile(c, 0.5),
            }
            for a, c in zip(alone, crowd, strict=True)
        ],
    }


async def added(client: Client, asked: Sequence[questions.Messages], journal: Path) -> list[float]:
    """Ask each, one at a time; return what came on top of the provider's time, in milliseconds."""
    return _added(await _misses(client, asked, 1), journal)


async def _misses(client: Client, asked: Sequence[questions.Messages], concurrency: int) -> dict[str, float]:
    """Ask each once; return the seconds each took, by the fingerprint the provider knows it by."""
    took: dict[str, float] = {}
    waiting = iter(asked)

    async def keep_on() -> None:
        for messages in waiting:
            call = Call("chat/completions", {"model": _MODEL, "messages": messages}, 0.0)
            began = perf_counter()
            reply = await client.ask(messages=messages, model=_MODEL)
            took[fingerprint(call)] = perf_counter() - began
            if reply.tier != "llm" or reply.collapsed:
                raise MillpondError(f"a miss was answered by {reply.tier}: the questions are not distinct")

    await asyncio.gather(*(keep_on() for _ in range(concurrency)))
    return took


def _added(took: dict[str, float], journal: Path) -> list[float]:
    """Return what came on top of the provider's time, in milliseconds."""
    provider = durations(journal)
    return [(seconds - provider[sha]) * 1000 for sha, seconds in took.items()]


def _figures(name: str, rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    p50, p95 = ([measure.percentile(one, q) for one in rounds] for q in (0.5, 0.95))
    return {
        f"{name}_p50_ms": round(median(p50), 3),
        f"{name}_p95_ms": round(median(p95), 3),
        f"{name}_p50_range": measure.summary(p50),
    }
