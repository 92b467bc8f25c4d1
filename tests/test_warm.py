"""Warming: what is missing is computed, what is there is left alone, live requests come first."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest

from producers.client import Client
from shared.entry import unpack
from shared.errors import InvalidRequest
from shared.keys import PartitionKeys, worker
from shared.link import Link
from shared.messages import Rules
from shared.settings import Settings, load
from shared.warming import Account, Warmer, Wish, most_asked, wish_for
from tests import command_line
from tests.command_line import run, run_json
from tests.conftest import Server
from tests.databases import Database
from tests.processes import start_worker

deployment = command_line.deployment

K = PartitionKeys(0)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    lines = [{"prompt": f"question {n}"} for n in range(5)] + [{"prompt": "question 0"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


# the command


def test_what_is_warmed_is_a_hit_and_is_not_warmed_again(deployment: str, questions: Path) -> None:
    first = run_json("warm", str(questions), url=deployment)
    assert (first["wishes"], first["warmed"], first["repeated"], first["present"]) == (6, 5, 1, 0)
    assert first["dollars"] > 0
    assert first["prompt_tokens"] > 0
    asked = run_json("ask", "question 3", url=deployment)
    assert asked["tier"] == "l2"
    again = run_json("warm", str(questions), url=deployment)
    assert (again["warmed"], again["present"], again["dollars"]) == (0, 5, 0.0)
    words = run("warm", str(questions), url=deployment).stdout
    assert "0 answers warmed" in words
    assert "5 already there" in words


def test_lines_that_cannot_be_read_are_refused_or_skipped(deployment: str, tmp_path: Path) -> None:
    file = tmp_path / "torn.jsonl"
    file.write_text('{"prompt": "whole"}\n{torn\n')
    assert "--skip-bad" in run_json("warm", str(file), url=deployment, status=2)["error"]["message"]
    found = run_json("warm", str(file), "--skip-bad", url=deployment)
    assert (found["warmed"], found["skipped"]) == (1, 1)


def test_what_cannot_be_computed_is_told(server: Server, questions: Path) -> None:
    failing: dict[str, Any] = {"simulated_first_token": 0.001, "simulated_failure_rate": 1.0, "attempts": 1}
    with start_worker("llm", server.url, **failing):
        found = run_json("warm", str(questions), url=server.url, status=1)
    assert (found["failed"], found["warmed"], found["unfinished"]) == (5, 0, 0)
    assert sum(found["errors"].values()) == 5


def test_it_says_what_is_missing(server: Server, questions: Path, tmp_path: Path) -> None:
    assert run_json("warm", status=2)["error"]["field"] == "file"
    assert run_json("warm", str(tmp_path / "none.jsonl"), status=2)["error"]["field"] == "file"
    assert "millpond up" in run_json("warm", str(questions), url=server.url, status=3)["error"]["message"]


# the warmer, without a worker


@pytest.fixture
async def link(server: Server) -> AsyncIterator[Link]:
    """A connection to a deployment whose LLM worker lives, and computes nothing."""
    made = Link(server.url)
    await made.send(
        [
            ("SET", worker("llm-idle"), "{}", "PX", 60_000),
            ("HSET", K.tags, "#last", "1-0"),
            ("XGROUP", "CREATE", K.refreshes, "llm", "0", "MKSTREAM"),
        ]
    )
    yield made
    await made.close()


@pytest.fixture
def rules(settings: Callable[..., Settings]) -> Rules:
    return Rules.of(settings())


def wishes(count: int, rules: Rules, **cache: Any) -> list[Wish]:
    return [wish_for({"input": f"text {n}"}, cache, rules) for n in range(count)]


class Watched:
    """A warming in the background, and how it stood when it was last heard of."""

    def __init__(self, warmer: Warmer, asked: list[Wish]) -> None:
        self.warmer = warmer
        self.heard = asyncio.Event()
        self.task = asyncio.create_task(warmer.run(asked, lambda _: self.heard.set()))

    async def a_round(self) -> Account:
        """Wait until it has gone round once more."""
        self.heard.clear()
        await asyncio.wait_for(self.heard.wait(), 10)
        return self.warmer.account

    async def __aenter__(self) -> Watched:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def land(link: Link, wish: Wish, *, epoch: str = "1-0", tags: tuple[str, ...] = ()) -> bytes:
    """Do what the LLM worker's landing does to a flight: its entry is there, the flight is gone."""
    meta = {"model": "m", "enc": "raw", "compute_ms": 1, "provider": "p", "tokens": [7, 3], "cost": 0.5}
    labels = (*wish.question.tags, *tags)
    head = f"mp2 {epoch} {int(time.time() * 1000)} 60000 0 0 {len(labels)}"
    text = "\n".join((head, *labels, "")).encode() + orjson.dumps(meta) + b'\n{"x":1}'
    unpack(wish.question.key, text)
    key = wish.question.key
    await link.send([("SET", K.entry(key), text, "PX", 60_000), ("DEL", K.flight(key))])
    return text


async def test_no_more_are_under_way_than_may_be(link: Link, settings: Callable[..., Settings], rules: Rules) -> None:
    asked = wishes(9, rules)
    async with Watched(Warmer(link, settings(), 1, at_once=4), asked) as watched:
        await watched.a_round()
        await watched.a_round()
        assert await link.call(("XLEN", K.refreshes)) == 4
        await land(link, asked[0])
        await land(link, asked[1])
        while watched.warmer.account.warmed < 2:
            await watched.a_round()
        await watched.a_round()
        assert await link.call(("XLEN", K.refreshes)) == 6
    account = watched.warmer.account
    assert (account.warmed, account.unfinished, account.dollars, account.prompt_tokens) == (2, 7, 1.0, 14)


async def test_half_of_one_workers_slots_are_left_to_live_fills(
    link: Link, settings: Callable[..., Settings], rules: Rules
) -> None:
    async with Watched(Warmer(link, settings(concurrency=6), 1), wishes(9, rules)) as watched:
        await watched.a_round()
        await watched.a_round()
        assert await link.call(("XLEN", K.refreshes)) == 3


async def test_the_rate_bounds_what_is_begun(link: Link, settings: Callable[..., Settings], rules: Rules) -> None:
    began = time.monotonic()
    async with Watched(Warmer(link, settings(), 1, rate=20.0), wishes(60, rules)) as watched:
        while await link.call(("XLEN", K.refreshes)) < 32:  # what a worker's half would take at once
            await watched.a_round()
        # One second's worth may come at once, the rest not before its time.
        assert time.monotonic() - began >= (32 - 21) / 20


async def test_a_key_somebody_computes_or_that_just_failed_is_left_alone(
    link: Link, settings: Callable[..., Settings], rules: Rules
) -> None:
    one, two = wishes(2, rules)
    until = int(time.time() * 1000) + 60_000
    await link.send(
        [
            ("HSET", K.flight(one.question.key), "token", "t", "epoch", "1-0", "tags", "", "ttl", 1, "store", 1),
            ("PEXPIRE", K.flight(one.question.key), 60_000),
            ("SET", K.failed(two.question.key), f'{until} 1\n{{"code":"rate_limited"}}', "PX", 60_000),
        ]
    )
    account = await Warmer(link, settings(), 1).run([one, two])
    assert (account.under_way, account.backing_off, account.complete) == (1, 1, False)
    assert await link.call(("XLEN", K.refreshes)) == 0


async def test_nothing_is_begun_while_redis_is_short_of_memory(
    link: Link, settings: Callable[..., Settings], rules: Rules
) -> None:
    await link.call(("SET", "mp:pressure", "1", "PX", 60_000))
    async with Watched(Warmer(link, settings(), 1), wishes(3, rules)) as watched:
        await watched.a_round()
        assert await link.call(("XLEN", K.refreshes)) == 0
        await link.call(("DEL", "mp:pressure"))
        while await link.call(("XLEN", K.refreshes)) < 3:
            await watched.a_round()


async def test_live_fills_that_always_come_do_not_starve_it(deployment: str, rules: Rules) -> None:
    link, settings = Link(deployment), load(redis_url=deployment)
    async with Client(deployment, settings=settings) as client:

        async def live() -> None:
            number = 0
            while True:
                number += 1
                await client.ask(f"live {number}")

        steady = asyncio.create_task(live())
        try:
            async with asyncio.timeout(20):
                account = await Warmer(link, settings, 1, at_once=2).run(wishes(40, rules))
        finally:
            steady.cancel()
            await asyncio.gather(steady, return_exceptions=True)
            await link.close()
    assert account.warmed == 40


# with PostgreSQL


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database.url, min_size=1, max_size=2) as made:
        yield made


async def keep(pool: asyncpg.Pool, wish: Wish, text: bytes, *, hits: int = 0, prompt: bytes | None = None) -> None:
    """Store an entry, and how often it was hit, as the persistence worker does."""
    entry = unpack(wish.question.key, text)
    created, fresh, expires, gone = (
        datetime.fromtimestamp(ms / 1000, UTC)
        for ms in (entry.created_ms, entry.fresh_ms, entry.expires_ms, entry.gone_ms)
    )
    key, kind = bytes.fromhex(wish.question.key), wish.question.kind
    await pool.execute(
        "INSERT INTO answers (key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile,"
        " tenant, model, bytes, entry, prompt)"
        " VALUES ($1, 0, 1, 0, $2, $3, $4, $5, $6, $7, $8, 'm', 1, $9, $10::text::jsonb)",
        key, created, fresh, expires, gone, list(entry.tags), kind.profile, kind.tenant, text,
        None if prompt is None else prompt.decode(),
    )  # fmt: skip
    if hits:
        await pool.execute("INSERT INTO top_keys VALUES (date_trunc('hour', now()), $1, $2)", key, hits)


async def test_what_postgresql_holds_is_brought_back_and_not_computed(
    link: Link, settings: Callable[..., Settings], rules: Rules, pool: asyncpg.Pool
) -> None:
    there, void = wishes(2, rules, tags=["doc:1"])
    for wish in (there, void):
        text = await land(link, wish, tags=(f"of:{wish.question.key}",))
        await keep(pool, wish, text)
        await link.call(("DEL", K.entry(wish.question.key)))
    later = f"{int(time.time() * 1000) + 1000}-0"
    await link.call(("HSET", K.tags, "#last", later, f"of:{void.question.key}", later))
    async with Watched(Warmer(link, settings(), 1, pool), [there, void]) as watched:
        await watched.a_round()
        await watched.a_round()
    assert (watched.warmer.account.restored, watched.warmer.account.unfinished) == (1, 1)
    assert await link.call(("EXISTS", K.entry(there.question.key))) == 1
    assert await link.call(("EXISTS", K.entry(void.question.key))) == 0
    assert await link.call(("XLEN", K.refreshes)) == 1


async def test_the_most_hit_are_asked_again_as_they_were(link: Link, rules: Rules, pool: asyncpg.Pool) -> None:
    first, second, unknown = wishes(3, rules, tenant="acme")
    await keep(pool, first, await land(link, first, tags=("doc:7",)), hits=9, prompt=first.body)
    await keep(pool, second, await land(link, second), hits=5, prompt=second.body)
    await keep(pool, unknown, await land(link, unknown), hits=7)
    since = datetime.now(UTC) - timedelta(hours=2)
    found, left_out = await most_asked(pool, since, 10, rules)
    assert ([wish.question.key for wish in found], left_out) == ([first.question.key, second.question.key], 1)
    assert found[0].question.tags == (*first.question.tags, "doc:7")
    assert (found[0].question.own_tags, found[0].question.ttl_ms) == (("doc:7",), 60_000)
    assert found[0].question.kind.tenant == "acme"
    # Another declared version of the model: another key, so that the old body is no longer what it was.
    other = Rules.of(load(model_versions={"gpt-4o-mini": "2"}))
    assert await most_asked(pool, since, 10, other) == ([], 3)


def test_top_says_when_no_prompt_was_stored(
    deployment: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "MILLPOND_DATABASE_URL" in run_json("warm", "--top", "5", url=deployment, status=3)["error"]["message"]
    monkeypatch.setenv("MILLPOND_DATABASE_URL", database.url)
    assert run_json("warm", "--top", "5", url=deployment)["wishes"] == 0
    asyncio.run(_a_key_without_a_prompt(database))
    refused = run_json("warm", "--top", "5", url=deployment, status=2)["error"]
    assert refused["field"] == "top"
    assert "MILLPOND_STORE_PROMPTS" in refused["message"]


async def _a_key_without_a_prompt(database: Database) -> None:
    await database.fetch("INSERT INTO top_keys VALUES (date_trunc('hour', now()), 'k', 3)")


def test_what_would_not_be_stored_cannot_be_warmed(rules: Rules) -> None:
    for mode in ("bypass", "no-store", "refresh"):
        with pytest.raises(InvalidRequest, match="stored"):
            wish_for({"input": "x"}, {"mode": mode}, rules)
