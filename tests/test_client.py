"""The client: what it asks goes out together, comes back once, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from producers.blocking import BlockingClient
from producers.client import Client
from producers.reply import Reply
from shared import keys
from shared.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    MillpondError,
    Overloaded,
    ProviderError,
    Unavailable,
)
from shared.keys import PartitionKeys
from shared.messages import SCHEMA
from tests import faults_support
from tests.conftest import Server
from tests.faults_support import Pond, answers, outcomes, until

pond = faults_support.pond
FAST: dict[str, Any] = {"simulated_first_token": 0.0}


def published(pond: Pond) -> int:
    """Return how often the publish script has run: the sum of calls of scripts, before and after, tells."""
    return int(pond.redis.info("commandstats")["cmdstat_evalsha"]["calls"])


def aboard(pond: Pond) -> int:
    """Return how many requests are aboard flights."""
    return sum(int(pond.redis.execute_command("LLEN", name)) for name in pond.found("{mp:*}:waiters:*"))


def waiting(client: Client) -> int:
    return len(client._waiting)


async def test_an_answer_has_everything_a_reply_promises(pond: Pond) -> None:
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        first = await client.ask("What is a millpond?", ttl=100, tags=["doc:1"])
        again = await client.ask("What is a millpond?")
    assert (first.tier, first.collapsed, first.stored, first.detail) == ("llm", False, True, "stored")
    assert again.tier in ("l1", "l2")
    assert (again.text, again.body, again.key, again.usage) == (first.text, first.body, first.key, first.usage)
    assert first.text
    assert first.model == "gpt-4o-mini"
    assert first.usage["completion_tokens"] > 0
    assert first.key == pond.key("What is a millpond?")
    assert first.request_id != again.request_id
    assert 0 <= first.age <= again.age < 30
    assert 0 < again.ttl <= first.ttl <= 100
    assert first.cache_status == "millpond; fwd=miss; stored"
    assert again.cache_status.startswith("millpond; hit; ttl=")
    assert "tier=" in repr(again)


async def test_thousands_at_once_are_each_told_their_own_answer(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm", concurrency=400, **FAST), pond.client() as client:
        found = await answers([client.ask(f"question {n % 500}") for n in range(3000)])
        assert waiting(client) == 0
    assert pond.calls() == 500
    assert len({(reply.key, reply.text) for reply in found}) == 500
    assert all(reply.key == pond.key(f"question {n % 500}") for n, reply in enumerate(found))
    assert len({reply.request_id for reply in found}) == 3000
    assert sum(reply.tier == "llm" and not reply.collapsed for reply in found) == 500


async def test_the_calls_of_one_turn_of_the_loop_go_out_as_one_command(pond: Pond) -> None:
    async with pond.client() as client:
        before = published(pond)
        asked = [asyncio.ensure_future(client.ask(f"q{n}", timeout=0.2)) for n in range(100)]
        await until(lambda: pond.length("requests") == 100, "all requests lie in the stream")
        assert published(pond) - before == 1
        assert {type(one) for one in await outcomes(asked)} == {DeadlineExceeded}


async def test_the_same_request_asked_at_once_is_computed_once(pond: Pond, partitions: int) -> None:
    async with pond.working("lookup", "llm"), pond.client() as one, pond.client() as other:
        found = await answers([client.ask("the same") for client in (one, other) for _ in range(200)])
    assert pond.calls() == 1
    assert sum(not reply.collapsed for reply in found) == 1
    assert len({reply.text for reply in found}) == 1


async def test_a_deadline_is_local_and_exact(pond: Pond) -> None:
    async with pond.client() as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.15 s"):
            await client.ask("nobody works", timeout=0.15)
        assert 0.15 <= time.monotonic() - began < 0.6
        assert waiting(client) == 0


async def test_a_deadline_of_one_does_not_fail_another(pond: Pond) -> None:
    async with pond.working("lookup", "llm", simulated_first_token=0.6), pond.client() as client:
        hasty, patient = await outcomes([client.ask("q", timeout=0.2), client.ask("q")])
    assert isinstance(hasty, DeadlineExceeded)
    assert isinstance(patient, Reply)
    assert pond.calls() == 1


async def test_a_deadline_exceeded_is_a_timeout_error(pond: Pond) -> None:
    async with pond.client() as client:
        with pytest.raises(TimeoutError):
            await client.ask("x", timeout=0.01)


async def test_a_request_past_its_deadline_is_not_computed(pond: Pond) -> None:
    async with pond.client() as client:
        with pytest.raises(DeadlineExceeded):
            await client.ask("too late", timeout=0.05)
        async with pond.working("lookup", "llm"):
            await pond.settled()
    assert pond.calls() == 0


async def test_cancelling_the_leader_does_not_harm_who_joined(pond: Pond) -> None:
    async with pond.working("lookup", "llm", simulated_first_token=0.5), pond.client() as client:
        leader = asyncio.ensure_future(client.ask("q"))
        await until(lambda: pond.calls() == 1, "the provider is called")
        follower = asyncio.ensure_future(client.ask("q"))
        await until(lambda: aboard(pond) == 2, "the second has joined")
        leader.cancel()
        assert (await follower).collapsed
        with pytest.raises(asyncio.CancelledError):
            await leader
        assert waiting(client) == 0
    assert pond.calls() == 1


async def test_what_is_cancelled_before_it_went_out_never_goes_out(pond: Pond) -> None:
    async with pond.client() as client:
        task = asyncio.ensure_future(client.ask("never"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with pytest.raises(DeadlineExceeded):
            await client.ask("marker", timeout=0.05)
        assert pond.length("requests") == 1
        assert waiting(client) == 0


async def test_many_cancelled_asks_leave_nothing_behind(pond: Pond) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        tasks = [asyncio.ensure_future(client.ask(f"q{n}")) for n in range(200)]
        await until(lambda: pond.length("fills") > 0, "fills wait")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert waiting(client) == 0
        await pond.settled()


async def test_a_full_stream_refuses_at_once_and_keeps_what_it_accepted(pond: Pond) -> None:
    async with pond.client(request_limit=10, timeout=25.0) as client:
        asked = [asyncio.ensure_future(client.ask(f"q{n}")) for n in range(25)]
        await until(lambda: sum(task.done() for task in asked) == 15, "what had no room is refused")
        refused = [task.exception() for task in asked if task.done()]
        assert all(isinstance(error, Overloaded) and error.retry_after for error in refused)
        accepted = [task for task in asked if not task.done()]
        async with pond.working("lookup", "llm", **FAST):
            assert len(await answers(accepted)) == 10


async def test_closing_tells_who_waits(pond: Pond) -> None:
    client = pond.client()
    await client.connect()
    asked = asyncio.ensure_future(client.ask("x"))
    await until(lambda: pond.length("requests") == 1, "the request is published")
    await client.close()
    with pytest.raises(Unavailable, match="closed"):
        await asked
    assert not pond.found("mp:reply:*")


async def test_closing_twice_and_connecting_again(pond: Pond) -> None:
    client = pond.client()
    async with pond.working("lookup", "llm", **FAST):
        await client.ask("connects by itself")
        await client.close()
        await client.close()
        assert (await client.ask("connects by itself")).tier in ("l1", "l2")
        await client.close()


async def test_connecting_many_times_at_once_connects_once(pond: Pond) -> None:
    client = pond.client()
    await asyncio.gather(*(client.connect() for _ in range(20)))
    assert len(pond.found("mp:reply:*")) == 1
    await client.close()


@pytest.mark.parametrize(
    ("what", "field"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "x", "input": "y"}, "prompt"),
        ({"prompt": "x", "timeout": 0}, "timeout"),
        ({"prompt": "x", "timeout": 1e9}, "timeout"),
        ({"prompt": "x", "timeout": "soon"}, "timeout"),
        ({"prompt": "x", "wish": object()}, "body"),
        ({"prompt": "\ud800"}, "body"),
        ({"prompt": "x" * 2_000_000}, "body"),
        ({"messages": []}, "messages"),
        ({"prompt": "x", "profile": "nope"}, "profile"),
        ({"prompt": "x", "mode": "nope"}, "mode"),
        ({"prompt": "x", "ttl": -1}, "ttl"),
        ({"prompt": "x", "ttl": float("nan")}, "ttl"),
        ({"prompt": "x", "tags": ["all"]}, "tags"),
        ({"prompt": "x", "tags": ["a b"]}, "tags"),
        ({"prompt": "x", "tenant": "a b"}, "tenant"),
        ({"prompt": "x", "max_age": "old"}, "max_age"),
        ({"prompt": "x", "scope": {"planet": "mars"}}, "scope"),
        ({"prompt": "x", "profile": "conversation"}, "conversation_id"),
    ],
)
async def test_what_is_wrong_is_named(pond: Pond, partitions: int, what: dict[str, Any], field: str) -> None:
    async with pond.working("lookup"), pond.client() as client:
        with pytest.raises(InvalidRequest) as refusal:
            await client.ask(**what)
        assert refusal.value.field == field
        assert waiting(client) == 0


async def test_a_body_that_is_no_json_is_refused_by_the_worker(pond: Pond) -> None:
    async with pond.working("lookup"), pond.client() as client:
        with pytest.raises(InvalidRequest) as refusal:
            await client.ask_body(b"{nope")
    assert refusal.value.field == "body"


async def test_a_body_reaches_the_provider_and_comes_back_unchanged(pond: Pond) -> None:
    body = {"model": "gpt-x", "messages": [{"role": "user", "content": "hi"}], "frobnicate": [1, {"a": None}]}
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        answer = await client.ask_body(body)
        other = await client.ask_body({**body, "frobnicate": 2})
    assert answer.model == "gpt-x"
    assert answer.body["object"] == "chat.completion"
    assert (answer.key != other.key, pond.calls()) == (True, 2)


@pytest.mark.parametrize(("asked", "kind"), [("a text", "response"), (["a text", "another"], "list")])
async def test_other_shapes_of_questions(pond: Pond, asked: Any, kind: str) -> None:
    profile = "embedding" if kind == "list" else None
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        reply = await client.ask(input=asked, profile=profile)
        again = await client.ask(input=asked, profile=profile)
    assert reply.body["object"] == again.body["object"] == kind
    assert again.tier != "llm"


async def test_a_provider_s_error_reaches_everyone_typed(pond: Pond, partitions: int) -> None:
    failing: dict[str, Any] = {"simulated_failure_rate": 1.0, "attempts": 1}
    async with pond.working("lookup", "llm", **failing), pond.client() as client:
        found = await outcomes([client.ask("q") for _ in range(20)])
        await pond.settled()
    assert {type(error) for error in found} == {ProviderError}
    assert {getattr(error, "status", None) for error in found} == {503}
    assert not pond.found("{mp:*}:entry:*")


async def test_a_process_configured_for_other_partitions_is_refused(pond: Pond) -> None:
    pond.redis.hset(keys.DEPLOYMENT, mapping={"partitions": 4, "schema": SCHEMA})
    with pytest.raises(ConfigError, match="MILLPOND_PARTITIONS=4") as refusal:
        await pond.client(partitions=1).connect()
    assert refusal.value.field == "partitions"


async def test_a_process_not_configured_takes_the_recorded_partitions(pond: Pond) -> None:
    pond.redis.hset(keys.DEPLOYMENT, mapping={"partitions": 4, "schema": SCHEMA})
    async with pond.client(partitions=None) as client:
        with pytest.raises(DeadlineExceeded):
            await asyncio.gather(*(client.ask(f"q{n}", timeout=0.1) for n in range(40)))
    assert sum(pond.redis.exists(PartitionKeys(p).requests) for p in range(4)) == 4


async def test_nobody_there_is_said_at_once(tmp_path: Any) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="doctor"):
        await Client(f"unix://{tmp_path}/none.sock").connect()
    assert time.monotonic() - began < 3


async def test_nothing_configured_and_nothing_running_says_what_to_do() -> None:
    with pytest.raises(Unavailable, match="millpond up"):
        await Client().connect()


async def test_a_client_s_defaults_hold_for_its_requests(pond: Pond) -> None:
    settings = pond.settings
    async with (
        pond.working("lookup", "llm", **FAST),
        Client(settings=settings, tenant="acme", profile="market") as acme,
        Client(settings=settings) as plain,
    ):
        keys = [
            (await acme.ask("q")).key,
            (await plain.ask("q", tenant="acme", profile="market")).key,
            (await acme.ask("q", tenant="default", profile="response")).key,
            (await plain.ask("q")).key,
        ]
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_the_blocking_client_asks_from_many_threads(server: Server, tmp_path: Any) -> None:
    with _working_in_a_thread(server, tmp_path) as settings, BlockingClient(settings=settings) as client:
        found: list[Reply] = []
        threads = [threading.Thread(target=lambda n=n: found.append(client.ask(f"q{n % 5}"))) for n in range(25)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == 25
        assert len({reply.key for reply in found}) == 5
        assert client.ask_body({"messages": [{"role": "user", "content": "q0"}], "model": "gpt-4o-mini"}).tier != "llm"
        assert set(client.invalidate(everything=True)) == {0}
        assert client.ask("q0").tier == "llm"
        with pytest.raises(InvalidRequest):
            client.ask("")
    client.close()
    with pytest.raises(MillpondError):
        BlockingClient(f"unix://{tmp_path}/none.sock").__enter__()


class _working_in_a_thread:  # noqa: N801 (used like a function)
    """Both workers, in a loop of their own: a blocking client needs its caller's thread."""

    def __init__(self, server: Server, tmp_path: Any) -> None:
        with server.connect() as connection:
            options = faults_support.QUICK | FAST | {"simulated_journal": tmp_path / "calls.jsonl"}
            self.pond = Pond(server.url, connection, options)
        self.ready, self.stop = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    async def _work(self) -> None:
        async with self.pond.working("lookup", "llm"):
            self.ready.set()
            await asyncio.to_thread(self.stop.wait)

    def __enter__(self) -> Any:
        self.thread.start()
        assert self.ready.wait(20)
        return self.pond.settings

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(20)


HEAVY = ("typer", "rich", "openai", "zstandard", "stamina", "limits", "arq", "matplotlib", "workers")


@pytest.mark.parametrize(
    "what", ["import millpond", "from millpond import Client, BlockingClient, Reply, MillpondError"]
)
def test_an_application_imports_only_the_light_client(what: str) -> None:
    code = f"import sys; {what}; print([name for name in {HEAVY} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"
