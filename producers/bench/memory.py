"""What ten thousand cached answers of about 2 KB of text take in Redis, all in.

`used_memory` after, less before, over the number of answers: entries, keys, the keyspace's own tables and what the
streams and the bookkeeping leave behind. How well an answer compresses decides much of it, so the same envelope is
also measured around ordinary English (Python's own language reference) and around noise that hardly compresses.
"""

from __future__ import annotations

import asyncio
import base64
import os
from statistics import median
from typing import Any

import orjson
import zstandard

from producers.bench import questions
from producers.bench.measure import Show
from producers.bench.stage import Stage
from producers.client import Client
from shared.entry import pack
from shared.keys import PartitionKeys
from shared.link import Link
from shared.settings import Settings

_WARM = 200
_SAMPLES = 300
_AT_ONCE = 500


async def run(stage: Stage, show: Show, *, answers: int = 10_000, compared: int = 1000) -> dict[str, Any]:
    """Measure on `stage`, through the real path: ask `answers` distinct questions once each."""
    show("memory: starting", 0.0)
    for _ in range(2):
        await stage.worker(
            "llm", simulated_first_token=0, simulated_tokens_per_second=1e9, simulated_tokens=questions.ANSWER_TOKENS
        )
    await stage.worker("lookup")
    link = Link(stage.url, name="millpond-bench")
    try:
        async with Client(stage.url, settings=stage.settings()) as client:
            asked = questions.distinct(_WARM + answers)
            await questions.answer_all(client, asked[:_WARM])
            before = await settled(link)
            texts: list[str] = []
            for at in range(_WARM, len(asked), _AT_ONCE):
                show(f"memory: {at - _WARM:,} of {answers:,} answers", 0.9 * (at - _WARM) / answers)
                texts += await questions.answer_all(client, asked[at : at + _AT_ONCE])
            used = await settled(link) - before
            keys = [PartitionKeys(0).entry((await client.ask(messages=m)).key) for m in asked[-_SAMPLES:]]
        show("memory: comparing", 0.95)
        return _figures(texts, used, *await _samples(link, keys)) | await _compared(
            link, keys[0], texts, stage.settings(), compared
        )
    finally:
        await link.close()


def _figures(texts: list[str], used: int, entries: list[int], sizes: list[int]) -> dict[str, Any]:
    return {
        "answers": len(texts),
        "text_bytes": round(sum(len(text.encode()) for text in texts) / len(texts)),
        "redis_bytes_per_answer": round(used / len(texts)),
        "entry_bytes": round(sum(entries) / len(entries)),
        "memory_usage_p50": round(median(sizes)),
        "used_memory_growth": used,
    }


async def settled(link: Link) -> int:
    """Return `used_memory` once it has stopped changing for 2.5 s.

    Flights are cleared shortly after they land; the server frees a connection's buffers when it was idle for 2 s.
    """
    last, still = -1, 0
    for _ in range(80):
        await asyncio.sleep(0.25)
        info = (await link.call(("INFO", "memory"))).decode()
        used = int(info.split("used_memory:", 1)[1].split("\r", 1)[0])
        still = still + 1 if abs(used - last) < 4096 else 0
        if still == 10:
            break
        last = used
    return used


async def _samples(link: Link, keys: list[str]) -> tuple[list[int], list[int]]:
    """Return the sizes of some entries: the value alone, and by MEMORY USAGE with all that belongs to it."""
    values = await link.send([("STRLEN", key) for key in keys])
    return values, await link.send([("MEMORY", "USAGE", key) for key in keys])


async def _compared(link: Link, like: str, texts: list[str], settings: Settings, count: int) -> dict[str, Any]:
    """Store other texts of the same length in the envelope of `like`; return what each kind would take."""
    entry: bytes = await link.call(("GET", like))
    head = entry[: entry.index(b'{"model"')]
    length = round(sum(map(len, texts)) / len(texts))
    found: dict[str, Any] = {"zstd_ratio": _ratio(texts)}
    for name, others in (("english", _english(length, count)), ("noise", _noise(length, count))):
        before = await settled(link)
        commands = []
        for number, text in enumerate(others):
            body = orjson.dumps(_like_an_answer(text))
            meta, packed = pack(body, model=settings.model, compute_ms=1, compress_above=settings.compress_above)
            stored = head + meta + b"\n" + packed
            commands.append(("SET", f"{PartitionKeys(0).entry_prefix}{name:>8}{number:024x}", stored, "PX", 86_400_000))
        await link.send(commands)
        found[f"{name}_bytes_per_answer"] = round((await settled(link) - before) / len(others))
        found[f"{name}_zstd_ratio"] = _ratio(others)
    return found


def _ratio(texts: list[str]) -> float:
    """Return how many times smaller plain zstd makes the texts, each by itself, without the entries' dictionary."""
    compressor = zstandard.ZstdCompressor(level=3)
    some = [text.encode() for text in texts[:_SAMPLES]]
    return round(sum(map(len, some)) / sum(len(compressor.compress(text)) for text in some), 2)


def _english(length: int, count: int) -> list[str]:
    """Return pieces of Python's language reference: ordinary technical English that nobody wrote for a benchmark."""
    from pydoc_data.topics import topics

    prose = " ".join(" ".join(topics.values()).split())
    pieces = [prose[at : at + length] for at in range(0, len(prose) - length, length)]
    return [pieces[number % len(pieces)] for number in range(count)]


def _noise(length: int, count: int) -> list[str]:
    """Return texts of printable characters, all equally likely: no text that anyone could read compresses less."""
    return [base64.b85encode(os.urandom(length)).decode()[:length] for _ in range(count)]


def _like_an_answer(text: str) -> dict[str, Any]:
    """Return the JSON a chat model's answer comes in."""
    identity = os.urandom(16).hex()
    return {
        "id": f"chatcmpl-{identity}",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 150, "completion_tokens": 430, "total_tokens": 580},
        "system_fingerprint": f"fp_{identity[:10]}",
    }
