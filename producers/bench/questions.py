"""What is asked: the demo's support and real-estate questions, as many different ones as a benchmark needs."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from producers.client import Client
from producers.replay.make_demo import WORKLOAD
from producers.replay.workload import read

#: Tokens of simulated answers that come to about 2 KB of text.
ANSWER_TOKENS = 435
POPULARITY = 1.1
_AT_ONCE = 64

Messages = list[dict[str, Any]]


def distinct(count: int) -> list[Messages]:
    """Return `count` conversations (instructions and a question), no two alike."""
    found: dict[str, Messages] = {}
    for request in read(WORKLOAD).requests:
        messages: Messages = request.body["messages"]
        found.setdefault(messages[-1]["content"], messages)
    different = list(found.values())
    made: list[Messages] = []
    for number in range(count):
        *before, last = different[number % len(different)]
        again = number // len(different)
        made.append([*before, last | {"content": f"({again + 1}) {last['content']}"} if again else last])
    return made


def popular(count: int, among: int) -> list[int]:
    """Return `count` draws from `among` questions with Zipf popularity: a few are asked all the time, most rarely."""
    weights = [1 / (rank + 1) ** POPULARITY for rank in range(among)]
    return random.Random(1).choices(range(among), weights, k=count)


async def answer_all(client: Client, questions: list[Messages]) -> list[str]:
    """Ask every question once; return the answers' texts."""
    texts = [""] * len(questions)
    numbers = iter(range(len(questions)))

    async def keep_on() -> None:
        for number in numbers:
            texts[number] = (await client.ask(messages=questions[number])).text

    await asyncio.gather(*(keep_on() for _ in range(_AT_ONCE)))
    return texts
