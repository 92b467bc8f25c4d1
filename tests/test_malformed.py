"""Messages that are malformed or misrouted: their sender is told, or they are buried, and nobody else suffers."""

from __future__ import annotations

from typing import Any

import pytest

from shared.keys import PartitionKeys
from tests import faults_support
from tests.faults_support import Pond, Raw, body_of, until

pond = faults_support.pond

PROMPT = "What is a tail race?"


# requests in the wrong partition


async def test_a_misrouted_request_is_answered_and_joins_the_rightly_routed_one(pond: Pond) -> None:
    pond = Pond(pond.url, pond.redis, pond.options | {"partitions": 4})
    raw, right = Raw(pond), pond.names(PROMPT).partition
    async with pond.working("lookup", "llm"):
        for n in range(8):
            raw.publish(f"r{n}", PROMPT, partition=n % 4)
        found = [await raw.answered(f"r{n}") for n in range(8)]
        await pond.settled()
    assert {(reply["tier"], reply["body"]["id"]) for reply in found} == {("llm", found[0]["body"]["id"])}
    assert pond.calls() == 1
    assert len(raw.replies()) == len({reply["collapsed"] for reply in found})  # one entry tells all who joined
    assert pond.redis.exists(PartitionKeys(right).entry(pond.key(PROMPT)))


async def test_a_misrouted_request_is_never_answered_from_before_an_invalidation(pond: Pond) -> None:
    pond = Pond(pond.url, pond.redis, pond.options | {"partitions": 4})
    raw = Raw(pond)
    async with pond.working("lookup", "llm"), pond.client() as client:
        for n in range(8):
            raw.publish(f"warm{n}", PROMPT, partition=n % 4)
            await raw.answered(f"warm{n}")
            await client.invalidate(everything=True)
            raw.publish(f"r{n}", PROMPT, partition=n % 4)
            assert (await raw.answered(f"r{n}"))["tier"] == "llm"
            await client.invalidate(key=pond.key(PROMPT))
        await pond.settled()
    assert pond.calls() == 16


# malformed messages


GOOD = body_of(PROMPT)
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "no body": ({"body": None}, "body"),
    "no deadline": ({"deadline": None}, "deadline"),
    "a deadline that is no number": ({"deadline": "soon"}, "deadline"),
    "a deadline of 5000 digits": ({"deadline": "9" * 5000}, "deadline"),
    "a body that is not JSON": ({"body": b"{"}, "body"),
    "a body that is not UTF-8": ({"body": b'{"messages":"\xff"}'}, "body"),
    "a body that is a list": ({"body": b"[]"}, "body"),
    "an empty body": ({"body": b""}, "body"),
    "a body nested without end": ({"body": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"}, "body"),
    "a body that is too long": ({"body": b'{"messages":"' + b"x" * (1 << 20) + b'"}'}, "body"),
    "half a surrogate pair": ({"body": b'{"messages":[{"role":"user","content":"\\ud800"}]}'}, "body"),
    "messages that are no list": ({"body": b'{"messages":7}'}, "messages"),
    "a model that is no text": ({"body": b'{"model":[],"messages":[{"role":"user","content":"x"}]}'}, "model"),
    "directives that are not JSON": ({"cache": b"\x00"}, "cache"),
    "an unknown directive": ({"cache": b'{"colour":1}'}, "colour"),
    "an unknown profile": ({"cache": b'{"profile":"nope"}'}, "profile"),
    "an unknown mode": ({"cache": b'{"mode":["default"]}'}, "mode"),
    "a tag with a line break": ({"cache": b'{"tags":["a\\nb"]}'}, "tags"),
    "a TTL without end": ({"cache": b'{"ttl":1e300}'}, "ttl"),
}
BURIED: dict[str, dict[str, Any]] = {
    "no field we know": {"id": None, "reply": None, "deadline": None, "body": None, "x": "y"},
    "no id": {"id": None},
    "an id with a space": {"id": "a b"},
    "no reply channel and no JSON": {"reply": None, "body": b"{"},
    "no reply channel of who is to compute": {"reply": None, "cache": b'{"lead":true}'},
    "a reply channel that is not UTF-8": {"reply": b"\xff"},
    "a reply channel with a space": {"reply": "a b"},
}


@pytest.mark.parametrize("how", TOLD)
async def test_a_malformed_request_is_told_what_is_wrong_with(pond: Pond, how: str) -> None:
    fields, field = TOLD[how]
    raw = Raw(pond)
    await _among_good_ones(pond, raw, fields)
    (reply,) = raw.replies("bad")
    assert (reply["error"]["code"], reply["error"]["field"]) == ("invalid_request", field)
    assert reply["error"]["message"]
    assert pond.length("dead") == 0


@pytest.mark.parametrize("how", BURIED)
async def test_a_malformed_request_that_cannot_be_told_is_a_dead_letter_with(pond: Pond, how: str) -> None:
    raw = Raw(pond)
    await _among_good_ones(pond, raw, BURIED[how])
    ((_, letter),) = pond.redis.xrange(PartitionKeys(0).dead)
    assert letter[b"reason"]
    assert letter[b"deliveries"] == b"1"


async def _among_good_ones(pond: Pond, raw: Raw, fields: dict[str, Any]) -> None:
    """Publish it between two good requests, all of them delivered in one batch; the good ones are answered."""
    raw.publish("before", PROMPT)
    raw.publish("bad", PROMPT, **fields)
    raw.publish("after", PROMPT)
    async with pond.working("lookup", "llm", simulated_first_token=0.0):
        assert (await raw.answered("before"))["tier"] == "llm"
        assert (await raw.answered("after"))["tier"] == "llm"
        await pond.settled()
    assert pond.calls() == 1


async def test_a_deadline_past_all_calendars_is_answered_and_leaves_nothing_for_ever(pond: Pond) -> None:
    raw = Raw(pond)
    async with pond.working("lookup", "llm"):
        raw.publish("r1", PROMPT, deadline="9" * 30)
        await until(lambda: pond.length("fills"), "the flight has begun")
        lives = [pond.redis.pttl(name) for part in ("flight", "waiters") for name in pond.found(f"*:{part}:*")]
        assert all(0 < life < 2 * 3600_000 for life in lives), lives
        assert (await raw.answered("r1"))["tier"] == "llm"
        await pond.settled()


FILLS: dict[str, dict[str, Any]] = {
    "nothing": {"x": "y"},
    "a spec that is not JSON": {"key": "k", "token": "t", "epoch": "0-0", "body": GOOD, "spec": "{"},
    "a spec that lacks its parts": {"key": "k", "token": "t", "epoch": "0-0", "body": GOOD, "spec": "{}"},
    "a key that is not UTF-8": {"key": b"\xff", "token": "t", "epoch": "0-0", "body": GOOD, "spec": "{}"},
}


@pytest.mark.parametrize("how", FILLS)
async def test_a_malformed_fill_is_a_dead_letter_with(pond: Pond, how: str) -> None:
    async with pond.working("lookup", "llm"), pond.client() as client:
        pond.redis.xadd(PartitionKeys(0).fills, FILLS[how])
        await client.ask(PROMPT)
        await pond.settled()
    ((_, letter),) = pond.redis.xrange(PartitionKeys(0).dead)
    assert b"not a fill" in letter[b"reason"]
    assert pond.calls() == 1


async def test_an_unreadable_entry_is_a_miss(pond: Pond) -> None:
    name = PartitionKeys(0).entry(pond.key(PROMPT))
    async with pond.working("lookup", "llm"), pond.client() as client:
        for junk in (b"junk", b"mp2 0-0 1 99999999999999 0 0 0\nnot JSON\nbody", b"mp9 0-0 1 2 0 0 0\n{}\n", b""):
            pond.redis.set(name, junk, ex=60)
            assert (await client.ask(PROMPT)).tier == "llm"
            await client.invalidate(everything=True)
        await pond.settled()
    assert pond.calls() == 4
