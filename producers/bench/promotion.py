"""What probation and promotion save of Redis' memory, and what they cost in hits, on a heavy-tailed stream.

The same stream is asked twice at once, in two profiles that differ only in their probation: `kept`, whose answers stay
in Redis for their whole day, and `promoted`, whose answers leave after a second unless they prove popular. L1 is
switched off, so that every hit is one of L2 or of L3. Time is compressed: a stream that takes a day is played in some
twenty seconds, so the second of probation stands for an hour or so, not for the ten minutes that are the default.

Then ten thousand answers of about 5 KB of text, all of them kept: what Redis takes when nothing leaves early.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from producers.bench.measure import Show
from producers.bench.memory import settled
from producers.bench.stage import Stage
from producers.client import Client
from shared.errors import InvalidRequest
from shared.keys import PartitionKeys
from shared.link import Link

PROBATION = 1.0
_DAY = 86_400.0
PROFILES = {
    "kept": {"ttl": _DAY, "probation": _DAY},
    "promoted": {"ttl": _DAY, "probation": PROBATION},
}
#: Tokens of simulated answers that come to about 5 KB of text.
_TOKENS = 1090
_AMONG = 20_000
_SAMPLE_EVERY = 1.0
_AT_ONCE = 64
_HITS = ("l2", "l3")

#: Moments from 0 to 1, and the names of what is asked then.
Stream = list[tuple[float, str]]


@dataclass(slots=True)
class _Arm:
    """One of the two profiles: who answered, and what its entries took whenever that was looked at."""

    tiers: Counter[str] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        total = self.tiers.total()
        weighted = sum(
            (later[0] - at) * size for (at, size, _), later in zip(self.samples, self.samples[1:], strict=False)
        )
        span = self.samples[-1][0] - self.samples[0][0]
        return {
            "l2_hit_rate": round(self.tiers["l2"] / total, 4),
            "l3_hit_rate": round(self.tiers["l3"] / total, 4),
            "hit_rate": round(sum(self.tiers[tier] for tier in _HITS) / total, 4),
            "provider_share": round(self.tiers["llm"] / total, 4),
            "l2_mean_bytes": round(weighted / span),
            "l2_end_bytes": self.samples[-1][1],
            "l2_end_entries": self.samples[-1][2],
        }


async def run(
    stage: Stage,
    show: Show,
    *,
    stream: Stream | None = None,
    trace: str = "synthetic",
    requests: int = 6000,
    seconds: float = 20.0,
    answers: int = 10_000,
) -> dict[str, Any]:
    """Play `requests` of `stream` (a synthetic one if None) in `seconds` on `stage`, then keep `answers` answers.

    `trace` is the stream's name in the report.
    """
    show("promotion: starting", 0.0)
    played = synthetic(requests) if stream is None else sampled(stream, requests)
    database = await stage.database()
    shared: dict[str, Any] = {"profiles": PROFILES, "database_url": database, "l1_entries": 0}
    fast = {"simulated_first_token": 0, "simulated_tokens_per_second": 1e9, "simulated_tokens": _TOKENS}
    await asyncio.gather(
        stage.worker("lookup", **shared),
        stage.worker("llm", **shared, **fast),
        stage.worker("persistence", **shared),
        stage.worker("promotion", **shared),
    )
    link = Link(stage.url, name="millpond-bench")
    try:
        async with Client(stage.url, settings=stage.settings(profiles=PROFILES)) as client:
            arms = {name: _Arm() for name in PROFILES}
            took = await _play(client, link, arms, played, seconds, show)
            found = await _ten_thousand(client, link, answers, show)
    finally:
        await link.close()
    kept, promoted = (arms[name].figures() for name in ("kept", "promoted"))
    return {
        "stream": trace,
        "requests": len(played),
        "distinct": len({name for _, name in played}),
        "stream_seconds": round(took, 1),
        "probation_seconds": PROBATION,
        "l2_memory_share": _share(promoted["l2_mean_bytes"], kept["l2_mean_bytes"]),
        "l2_memory_share_at_end": _share(promoted["l2_end_bytes"], kept["l2_end_bytes"]),
        "l2_hits_share": _share(promoted["l2_hit_rate"], kept["l2_hit_rate"]),
        "all_hits_share": _share(promoted["hit_rate"], kept["hit_rate"]),
        "with_probation": promoted,
        "without_probation": kept,
        **found,
    }


# the streams


def synthetic(count: int) -> Stream:
    """Return a stream of Zipf popularity, exponent 1: most of what is asked is asked once."""
    weights = [1 / (rank + 1) for rank in range(_AMONG)]
    drawn = random.Random(1).choices(range(_AMONG), weights, k=count)
    return [(number / count, f"question {name}") for number, name in enumerate(drawn)]


def read_trace(path: Path) -> Stream:
    """Read a trace: CSV, perhaps gzipped, with a column `key`, and `ts_s` (seconds) unless requests come evenly.

    Raises:
        InvalidRequest: it cannot be read, or is none.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            rows = [(row["key"], float(row.get("ts_s") or number)) for number, row in enumerate(csv.DictReader(lines))]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as problem:
        raise InvalidRequest(
            f"--trace {path}: {problem}; give a CSV file (.gz or not) with a column `key`, and `ts_s` if it has times",
            field="trace",
        ) from None
    if not rows:
        raise InvalidRequest(f"--trace {path}: it has no rows", field="trace")
    rows.sort(key=lambda row: row[1])
    first, span = rows[0][1], (rows[-1][1] - rows[0][1]) or 1.0
    return [((at - first) / span, name) for name, at in rows]


def sampled(stream: Stream, count: int) -> Stream:
    """Return about `count` requests: all of some keys, none of the others, so that keys recur as they did (SHARDS)."""
    if len(stream) <= count:
        return stream
    share = count / len(stream)
    return [one for one in stream if _draw(one[1]) < share]


def _draw(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


# playing them


async def _play(client: Client, link: Link, arms: dict[str, _Arm], stream: Stream, seconds: float, show: Show) -> float:
    """Ask the stream in both profiles at its own pace; return how long that took."""
    room = asyncio.Semaphore(_AT_ONCE)
    began = perf_counter()

    async def ask(profile: str, name: str) -> None:
        async with room:
            reply = await client.ask(name, profile=profile)
        arms[profile].tiers[reply.tier] += 1
        arms[profile].keys.add(reply.key)

    async def look() -> None:
        while True:
            await _weigh(link, arms.values(), perf_counter() - began)
            await asyncio.sleep(_SAMPLE_EVERY)

    looking = asyncio.create_task(look())
    try:
        async with asyncio.TaskGroup() as tasks:
            for number, (moment, name) in enumerate(stream):
                ahead = began + moment * seconds - perf_counter()
                if ahead > 0:
                    await asyncio.sleep(ahead)
                if number % 200 == 0:
                    show(f"promotion: {number:,} of {len(stream):,} asked", 0.05 + 0.6 * number / len(stream))
                for profile in arms:
                    tasks.create_task(ask(profile, name))
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    took = perf_counter() - began
    await _weigh(link, arms.values(), took)
    return took


async def _weigh(link: Link, arms: Iterable[_Arm], at: float) -> None:
    """Add up what the entries of each arm take in Redis now."""
    for arm in arms:
        names = [PartitionKeys(0).entry(key) for key in arm.keys]
        sizes = [size for size in await link.send([("MEMORY", "USAGE", name) for name in names]) if size]
        arm.samples.append((at, sum(sizes), len(sizes)))


async def _ten_thousand(client: Client, link: Link, count: int, show: Show) -> dict[str, Any]:
    """Have `count` distinct questions answered and kept; return what Redis takes for them, all in."""
    before = await settled(link)
    asked = iter(range(count))
    size = 0

    async def keep_on() -> None:
        nonlocal size
        for number in asked:
            reply = await client.ask(f"kept question {number}", profile="kept")
            size += len(reply.text.encode())
            if number % 500 == 0:
                show(f"promotion: {number:,} of {count:,} kept", 0.7 + 0.25 * number / count)

    await asyncio.gather(*(keep_on() for _ in range(_AT_ONCE)))
    for _ in range(200):
        if not await link.call(("XLEN", PartitionKeys(0).landed)):
            break
        await asyncio.sleep(0.1)  # on its way to PostgreSQL: not what is asked here
    used = await settled(link) - before
    return {
        "answers": count,
        "answer_bytes": round(size / count),
        "answers_mb": round(used / 1e6, 2),
        "answers_redis_bytes": round(used / count),
    }


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0
