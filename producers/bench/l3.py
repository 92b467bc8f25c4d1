"""How long an answer takes that only PostgreSQL still has, beside a million others.

The rows are made once, in a PostgreSQL of the benchmark's own under the user's cache directory, and found again by the
next run. Each question is asked once, one at a time, through the whole path: a request on the stream, a miss in L1 and
L2, one query, the answer judged by the markers, written back into L2, the reply. The same reads through the tier alone
show what the query takes of that.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter, time
from typing import Any

import asyncpg
import orjson

from migrations import migrate_async
from producers.bench import measure, questions
from producers.bench.measure import Show, rounded_percentile
from producers.bench.stage import Stage
from producers.client import Client
from shared import postgres
from shared.counters import Counters
from shared.entry import pack
from shared.errors import MillpondError, NotCached
from shared.messages import Rules, understand
from shared.profiles import DAY
from shared.providers.prose import answer
from shared.tiers.l3 import L3

STORED = 1_000_000
#: Questions of the workload that have an answer among those stored; each run asks some of them.
_ASKABLE = 20_000
_TEMPLATES = 2000
_AT_ONCE = 20_000
_TTL = 366 * DAY
_FRESH = 300 * DAY
#: Changes whenever rows made before would no longer do.
_RECIPE = "1"
#: What is stored can be made again: nothing has to survive a crash.
_OPTIONS = {
    "fsync": "off", "wal_level": "minimal", "max_wal_senders": "0", "max_wal_size": "512MB", "shared_buffers": "256MB",
    "maintenance_work_mem": "256MB", "autovacuum": "off",
}  # fmt: skip
_COLUMNS = (
    "key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile, tenant, model, provider, "
    "endpoint, prompt_tokens, completion_tokens, cost, compute_ms, bytes, entry"
)
#: A key that nobody asks for is as random as a real one.
_ROWS = f"""INSERT INTO answers ({_COLUMNS})
    SELECT coalesce(asked.key, decode(md5('millpond ' || n), 'hex')), 0, 0, 0, $3, $4, $4, $4, t.tags, 'response',
        'default', 'gpt-4o-mini', 'simulated', 'chat', 150, 435, 0.0003, 900, length(t.entry), t.entry
    FROM generate_series($1::int, $2::int - 1) AS n
    JOIN templates AS t ON t.number = n % {_TEMPLATES}
    LEFT JOIN asked ON asked.number = n
    ON CONFLICT DO NOTHING"""  # noqa: S608


async def run(
    stage: Stage,
    show: Show,
    *,
    stored: int = STORED,
    askable: int = _ASKABLE,
    asked: int = 1500,
    seed: int | None = None,
) -> dict[str, Any]:
    """Measure on `stage` with one lookup worker; `hit_p50_ms` and `hit_p95_ms` are of the whole path."""
    place = _cache() if stored == STORED else stage.scratch / "l3"
    seed = int(time()) if seed is None else seed
    show("l3: starting PostgreSQL", 0.0)
    with _started(place) as server:
        rules = Rules.of(stage.settings())
        bodies = [_body(messages) for messages in questions.distinct(askable)]
        keys = [understand(body, None, rules).key for body in bodies]
        began = perf_counter()
        made = await _fill(server.url, keys, stored, lambda done: show(f"l3: {stored:,} answers, once", 0.8 * done))
        filling = perf_counter() - began if made else 0.0
        await stage.worker("lookup", database_url=server.url)
        drawn = random.Random(seed).sample(range(askable), min(askable, 3 * asked))
        warm, alone, together = drawn[: len(drawn) // 5], drawn[len(drawn) // 5 : -asked], drawn[-asked:]
        async with Client(stage.url, settings=stage.settings()) as client:
            show("l3: asking", 0.8)
            ask = _Asking(client, bodies)
            await measure.latencies(ask.one(warm), len(warm))
            ask.tiers.clear()
            took = await measure.latencies(ask.one(alone), len(alone))
            show("l3: asking, many at once", 0.9)
            began = perf_counter()
            await measure.latencies(ask.one(together), len(together), concurrency=32)
            rate = len(together) / (perf_counter() - began)
        show("l3: the tier alone", 0.95)
        single, batch = await _tier(server.url, keys, seed)
        return {
            "stored": await _count(server.url),
            "hit_p50_ms": rounded_percentile(took, 0.5),
            "hit_p95_ms": rounded_percentile(took, 0.95),
            "hit_p99_ms": rounded_percentile(took, 0.99),
            "hits": ask.tiers.get("l3", 0),
            "not_hits": sum(count for tier, count in ask.tiers.items() if tier != "l3"),
            "hits_per_s_32_at_once": round(rate),
            "tier_p50_ms": rounded_percentile(single, 0.5),
            "tier_p95_ms": rounded_percentile(single, 0.95),
            "tier_64_keys_p50_ms": rounded_percentile(batch, 0.5),
            "tier_64_keys_p95_ms": rounded_percentile(batch, 0.95),
            "filled_in_s": round(filling, 1),
            "postgresql": server.version,
            "seed": seed,
        }


class _Asking:
    """Asks questions that must be in the cache, each once, and counts which tier answered."""

    def __init__(self, client: Client, bodies: Sequence[bytes]) -> None:
        self._client = client
        self._bodies = bodies
        self.tiers: dict[str, int] = {}

    def one(self, numbers: Sequence[int]) -> measure.Operation:
        """Return the operation that asks the questions of these numbers in turn."""

        async def ask(number: int) -> None:
            try:
                reply = await self._client.ask_body(self._bodies[numbers[number]], mode="only-if-cached")
            except NotCached:
                self.tiers["none"] = self.tiers.get("none", 0) + 1
                return
            if not reply.text:
                raise MillpondError("an answer is empty; this is a bug, please report it")
            self.tiers[reply.tier] = self.tiers.get(reply.tier, 0) + 1

        return ask


def _body(messages: questions.Messages) -> bytes:
    return orjson.dumps({"model": "gpt-4o-mini", "messages": messages})


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "millpond" / "bench-l3"


def _started(place: Path) -> postgres.EmbeddedPostgres:
    """Start PostgreSQL on what an earlier run left, or afresh where that is of no use any more."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        return postgres.start(place, options=_OPTIONS)
    except MillpondError:
        shutil.rmtree(place / "postgres", ignore_errors=True)
        return postgres.start(place, options=_OPTIONS)


async def _count(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM answers"))
    finally:
        await connection.close()


async def _fill(url: str, keys: list[str], stored: int, show: Any) -> bool:
    """Store the answers, unless an earlier run did; return whether there was something to do."""
    await migrate_async(url)
    connection = await asyncpg.connect(url)
    try:
        note = await connection.fetchval("SELECT obj_description('answers'::regclass)") or ""
        recipe, _, made = note.rpartition(" ")
        wanted = f"millpond bench {_RECIPE} {stored} {len(keys)} {keys[-1]}"
        if recipe == wanted and float(made) > time() - _FRESH:
            return False
        async with connection.transaction():  # an interrupted filling leaves nothing behind
            await _make(connection, keys, stored, show)
            await connection.execute(f"COMMENT ON TABLE answers IS '{wanted} {time():.0f}'")
        await connection.execute("VACUUM (FREEZE, ANALYZE) answers")
        await connection.execute("CHECKPOINT")
        return True
    finally:
        await connection.close()


async def _make(connection: Any, keys: list[str], stored: int, show: Any) -> None:
    indexes = await connection.fetch(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'answers' AND indexname <> 'answers_pkey'"
    )
    for name, _ in indexes:
        await connection.execute(f'DROP INDEX "{name}"')
    await connection.execute("TRUNCATE answers")
    created = datetime.fromtimestamp(int(time()), UTC)
    await connection.execute("CREATE TEMP TABLE templates (number int PRIMARY KEY, tags text[], entry bytea)")
    await connection.execute("CREATE TEMP TABLE asked (number int PRIMARY KEY, key bytea)")
    await connection.copy_records_to_table("templates", records=_templates(int(created.timestamp() * 1000)))
    spread = max(1, stored // len(keys))
    records = [(number * spread, bytes.fromhex(key)) for number, key in enumerate(keys)]
    await connection.copy_records_to_table("asked", records=records)
    await connection.execute("ANALYZE templates; ANALYZE asked")
    for at in range(0, stored, _AT_ONCE):
        show(0.85 * at / stored)
        until = min(stored, at + _AT_ONCE)
        await connection.execute(_ROWS, at, until, created, created + timedelta(seconds=_TTL))
    for number, (_, definition) in enumerate(indexes):
        show(0.85 + 0.05 * number)
        await connection.execute(definition)


def _templates(created_ms: int) -> list[tuple[int, list[str], bytes]]:
    """Return answers of about 2 KB of text, as `land` composes them."""
    made = []
    for number in range(_TEMPLATES):
        text = answer(f"What about {number}?", questions.ANSWER_TOKENS, str(number))
        body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        meta, packed = pack(
            orjson.dumps(body), model="gpt-4o-mini", compute_ms=900, compress_above=256, provider="simulated",
            tokens=(150, questions.ANSWER_TOKENS), cost=0.0003,
        )  # fmt: skip
        tags = [f"doc:{number}", "profile:response", "tenant:default", "model:gpt-4o-mini"]
        head = f"mp2 0-0 {created_ms} {int(_TTL * 1000)} 0 0 {len(tags)}\n" + "\n".join(tags) + "\n"
        made.append((number, tags, head.encode() + meta + b"\n" + packed))
    return made


async def _tier(url: str, keys: list[str], seed: int) -> tuple[list[float], list[float]]:
    """Return how long the tier's own `find` takes, in milliseconds: of one key, and of 64."""
    rng = random.Random(seed)
    tier = L3(url, Counters(), timeout=5.0)
    try:

        async def find(count: int) -> None:
            wanted = rng.sample(keys, min(count, len(keys)))
            if len(await tier.find(wanted)) != len(wanted):
                raise MillpondError("a stored answer was not found; this is a bug, please report it")

        await measure.latencies(lambda _: find(1), 50)
        return await measure.latencies(lambda _: find(1), 1000), await measure.latencies(lambda _: find(64), 200)
    finally:
        await tier.close()
