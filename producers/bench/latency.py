"""How long one cached answer takes, asked one at a time, beside how long one GET takes.

The bare echo runs too: it shows what two streams and a second process take by themselves.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import orjson

from producers.bench import measure, questions, rivals
from producers.bench.hits import asking, fill
from producers.bench.measure import Show
from producers.bench.stage import Stage
from producers.client import Client


async def run(stage: Stage, show: Show, *, rounds: int = 9, count: int = 400, distinct: int = 100) -> dict[str, Any]:
    """Measure on `stage` with one lookup worker; `ratio` is the median of the ratios within each round."""
    show("latency: filling the cache", 0.0)
    llm = await stage.worker(
        "llm", simulated_first_token=0, simulated_tokens_per_second=1e9, simulated_tokens=questions.ANSWER_TOKENS
    )
    await stage.worker("lookup")
    async with Client(stage.url, settings=stage.settings()) as client:
        cached = await fill(client, stage, distinct)
        llm.kill()
        ask = asking(client, cached.questions, range(distinct))
        bodies = [orjson.dumps({"model": "gpt-4o-mini", "messages": messages}) for messages in cached.questions]
        await stage.child("echo", size=cached.reply_bytes)
        async with (
            rivals.single_get(stage.url, cached.keys) as get,
            rivals.single_echo(stage.url, bodies) as echo,
        ):
            contenders = {"millpond": ask, "get": get, "echo": echo}
            found: list[dict[str, float]] = []
            tails: list[float] = []
            for number in range(rounds):
                show(f"latency: round {number + 1} of {rounds}", (number + 0.5) / (rounds + 0.5))
                one: dict[str, float] = {}
                for name in measure.turns(tuple(contenders), number):
                    took = await measure.latencies(contenders[name], count)
                    one[name] = measure.percentile(took, 0.5)
                    tails += took if name == "millpond" else []
                found.append(one)
    ratio = measure.ratios(found, "millpond", "get")
    return {
        **{f"{name}_p50_ms": round(median(one[name] for one in found), 4) for name in contenders},
        "ratio": ratio["median"],
        "ratio_range": ratio,
        "ratio_to_echo_range": measure.ratios(found, "millpond", "echo"),
        "millpond_p95_ms": round(measure.percentile(tails, 0.95), 4),
        "millpond_p99_ms": round(measure.percentile(tails, 0.99), 4),
        "calls_per_round": count,
        "reply_bytes": cached.reply_bytes,
        "rounds": measure.rounded(found),
    }
