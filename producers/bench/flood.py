"""One of a stampede's producers, a process of its own: on a signal, asks the same question many times at once.

Run as `python -m producers.bench.flood '{"url": …}'`. It says `ready`, then for each line of its input, a JSON object
with `messages` and `requests`, prints what became of them.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from time import perf_counter
from typing import Any

import orjson

from producers.client import Client
from producers.reply import Reply
from shared.console import print_json
from shared.errors import MillpondError
from shared.loop import run_fast
from shared.settings import load

_TIMEOUT = 45.0


async def work(url: str) -> None:
    """Do as told, until the input ends."""
    async with Client(settings=load(redis_url=url, partitions=1)) as client:
        print_json({"event": "ready"})
        while line := await asyncio.to_thread(sys.stdin.buffer.readline):
            print_json(await _flood(client, **orjson.loads(line)))


async def _flood(client: Client, messages: list[dict[str, Any]], requests: int) -> dict[str, Any]:
    began = perf_counter()
    asking = [client.ask(messages=messages, timeout=_TIMEOUT) for _ in range(requests)]
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    took = perf_counter() - began
    replies = [outcome for outcome in outcomes if isinstance(outcome, Reply)]
    errors = Counter(
        outcome.code if isinstance(outcome, MillpondError) else type(outcome).__name__
        for outcome in outcomes
        if not isinstance(outcome, Reply)
    )
    return {
        "answered": sum(1 for reply in replies if reply.text),
        "joined": sum(reply.collapsed for reply in replies),
        "cached": sum(reply.tier != "llm" for reply in replies),
        "errors": dict(errors),
        "texts": sorted({reply.text for reply in replies}),
        "wall_s": round(took, 3),
    }


if __name__ == "__main__":
    run_fast(work(**orjson.loads(sys.argv[1])))
