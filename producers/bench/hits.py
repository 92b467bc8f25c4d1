"""Cached answers per second: Millpond, a plain GET and a bare echo, in turns, at the same concurrency.

Millpond is asked as an application asks: each question is written as JSON, each answer's text is read out of its JSON.
GET and echo do neither, they pass bytes; `millpond_raw` passes bytes too, for a comparison of like with like.
A popular answer goes out once for all who ask for it in one batch; `millpond_even` asks for all equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any

import orjson

from producers.bench import measure, questions, rivals
from producers.bench.measure import Show
from producers.bench.stage import Stage
from producers.client import Client
from shared.errors import MillpondError
from shared.keys import PartitionKeys
from shared.link import Link
from shared.providers.simulated import calls

_CONTENDERS = ("millpond", "get", "echo", "millpond_raw", "millpond_even")
_DRAWS = 20_011  # a prime, so that no concurrency falls into step with it


@dataclass(frozen=True, slots=True)
class Cached:
    """Questions whose answers are in the cache: the keys of their entries, and sizes in bytes, each the mean."""

    questions: list[questions.Messages]
    keys: list[str]
    text_bytes: int
    entry_bytes: int
    reply_bytes: int


async def fill(client: Client, stage: Stage, count: int) -> Cached:
    """Put `count` answers into the cache, by asking."""
    asked = questions.distinct(count)
    texts = await questions.answer_all(client, asked)
    names, replies = [], []
    k = PartitionKeys(0)
    for messages in asked:
        reply = await client.ask(messages=messages)
        names.append(k.entry(reply.key))
        replies.append(len(orjson.dumps(reply.body)))
    link = Link(stage.url, name="millpond-bench")
    try:
        sizes = await link.send([("STRLEN", name) for name in names])
    finally:
        await link.close()
    mean = [round(sum(sizes) / len(sizes)) for sizes in ([len(t.encode()) for t in texts], sizes, replies)]
    return Cached(asked, names, *mean)


async def run(
    stage: Stage, show: Show, *, rounds: int = 25, seconds: float = 0.3, concurrency: int = 100, distinct: int = 300
) -> dict[str, Any]:
    """Measure on `stage` with one lookup worker and this process as the producer.

    `ratio_to_get` and `ratio_to_echo` are medians of the ratios within each round. `producer_cpu_us` is this process's
    own work per answer, in microseconds; unlike the rates it hardly depends on how many processors there are.
    """
    show("hits: filling the cache", 0.0)
    journal = stage.journal()
    llm = await stage.worker(
        "llm", simulated_first_token=0, simulated_tokens_per_second=1e9, simulated_journal=journal,
        simulated_tokens=questions.ANSWER_TOKENS,
    )  # fmt: skip
    await stage.worker("lookup")
    async with Client(stage.url, settings=stage.settings()) as client:
        cached = await fill(client, stage, distinct)
        llm.kill()  # its waiting would cost the others time
        await stage.child("echo", size=cached.reply_bytes)
        before = len(calls(journal))
        draws = questions.popular(_DRAWS, distinct)
        bodies = [orjson.dumps({"model": "gpt-4o-mini", "messages": cached.questions[draw]}) for draw in draws]
        evenly = [number * 7919 % distinct for number in range(distinct)]

        async def ask_raw(number: int) -> None:
            await client.ask_body(bodies[number % _DRAWS])

        keys = [cached.keys[draw] for draw in draws]
        async with (
            rivals.fastest_get(stage.url, keys, concurrency) as (pool, get),
            rivals.fastest_echo(stage.url, bodies, concurrency) as (publishing, echo),
        ):
            contenders = {
                "millpond": asking(client, cached.questions, draws),
                "get": get,
                "echo": echo,
                "millpond_raw": ask_raw,
                "millpond_even": asking(client, cached.questions, evenly),
            }
            await measure.rate(contenders["millpond"], concurrency, min(seconds, 0.5))
            found: list[dict[str, float]] = []
            cpu: dict[str, list[float]] = {name: [] for name in _CONTENDERS}
            for number in range(rounds):
                show(f"hits: round {number + 1} of {rounds}", (number + 0.5) / (rounds + 0.5))
                one: dict[str, float] = {}
                for name in measure.turns(_CONTENDERS, number):
                    began, spent = perf_counter(), process_time()
                    one[name] = await measure.rate(contenders[name], concurrency, seconds)
                    cpu[name].append((process_time() - spent) / (perf_counter() - began) / one[name])
                found.append(one)
    to_get, to_echo = measure.ratios(found, "millpond", "get"), measure.ratios(found, "millpond", "echo")
    return {
        **{f"{name}_per_s": round(median(one[name] for one in found)) for name in _CONTENDERS},
        "ratio_to_get": to_get["median"],
        "ratio_to_echo": to_echo["median"],
        "ratio_to_get_range": to_get,
        "ratio_to_echo_range": to_echo,
        **{
            f"{name}_ratio_to_{rival}_range": measure.ratios(found, f"millpond_{name}", rival)
            for name in ("raw", "even")
            for rival in ("get", "echo")
        },
        "producer_cpu_us": {name: round(median(spent) * 1e6, 1) for name, spent in cpu.items()},
        "provider_calls_meanwhile": len(calls(journal)) - before,
        "concurrency": concurrency,
        "questions": f"{distinct} different ones, Zipf popularity {questions.POPULARITY}",
        "body_bytes": round(sum(map(len, bodies)) / len(bodies)),
        "text_bytes": cached.text_bytes,
        "entry_bytes": cached.entry_bytes,
        "reply_bytes": cached.reply_bytes,
        "get_by": pool,
        "echo_publishes_by": publishing,
        "rounds": measure.rounded(found),
    }


def asking(client: Client, asked: list[questions.Messages], order: Sequence[int]) -> measure.Operation:
    """Return the operation that asks these questions in this order, over and over, and reads the answers' texts."""
    most = len(order)

    async def ask(number: int) -> None:
        if not (await client.ask(messages=asked[order[number % most]])).text:
            raise MillpondError("an answer is empty; this is a bug, please report it")

    return ask
