"""Chains of providers: who is asked after whom, what ends a chain, what is told of it to the durable tier."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest

from shared.errors import ConfigError, ContentFiltered, ProviderError, ProviderTimeout
from shared.providers.chain import Attempt, Chains, ask
from shared.providers.simulated import calls
from tests import faults_support
from tests.faults_support import Pond
from tests.openai_server import configured
from tests.outages import Outage

pond = faults_support.pond

TWO: dict[str, Any] = {
    "providers": {"one": {"kind": "simulated"}, "two": {"kind": "simulated"}},
    "profiles": {"response": {"providers": ["one:alpha:7b", "two"]}},
    "simulated_first_token": 0.0,
    "simulated_tokens_per_second": 1e6,
}
BODY = {"model": "asked", "messages": [{"role": "user", "content": "Where is my parcel?"}]}


async def tried(path: Any, outage: str, **changes: Any) -> tuple[Any, list[Attempt]]:
    """Ask the chain while the outage file says that; return what came of it and what was tried."""
    (path / "outage").write_text(outage)
    settings = configured(simulated_outage=path / "outage", simulated_journal=path / "calls", **(TWO | changes))
    chains, attempts = Chains(settings), list[Attempt]()
    try:
        return await ask(chains.of("response"), "chat/completions", BODY, settings, attempts=attempts), attempts
    except ProviderError as error:
        return error, attempts
    finally:
        await chains.close()


def told(attempts: list[Attempt]) -> list[tuple[str, str, str]]:
    return [(one["provider"], one["model"], one["outcome"]) for one in attempts]


async def test_the_first_of_a_chain_answers_with_its_own_model(tmp_path: Any) -> None:
    answered, attempts = await tried(tmp_path, "nobody")
    assert (answered.provider, answered.model) == ("one:alpha:7b", "alpha:7b")
    assert orjson.loads(answered.completion.body)["model"] == "simulated/alpha:7b"
    assert told(attempts) == [("one:alpha:7b", "alpha:7b", "ok")]


async def test_the_next_answers_once_the_retries_of_the_first_are_over(tmp_path: Any) -> None:
    answered, attempts = await tried(tmp_path, "one", attempts=2)
    assert (answered.provider, answered.model) == ("two", "asked")
    failed = ("one:alpha:7b", "alpha:7b", "provider_error")
    assert told(attempts) == [failed, failed, ("two", "asked", "ok")]
    assert [call["provider"] for call in calls(tmp_path / "calls")] == ["one", "one", "two"]


async def test_a_provider_that_hangs_leaves_time_for_the_next(tmp_path: Any) -> None:
    began = time.monotonic()
    answered, attempts = await tried(tmp_path, "one hang", total_timeout=1.0, attempt_timeout=1.0)
    assert answered.provider == "two"
    assert told(attempts)[0] == ("one:alpha:7b", "alpha:7b", ProviderTimeout.code)
    assert 0.4 < time.monotonic() - began < 0.95


@pytest.mark.parametrize(("status", "asked"), [(400, 1), (422, 1), (451, 1), (401, 2), (404, 2), (429, 2), (503, 2)])
async def test_a_request_that_is_refused_for_itself_is_taken_to_nobody_else(
    tmp_path: Any, status: int, asked: int
) -> None:
    found, attempts = await tried(tmp_path, f"one {status}\ntwo 500", attempts=1)
    assert isinstance(found, ProviderError)
    assert isinstance(found, ContentFiltered) == (status == 451)
    assert (found.status, len(attempts)) == (status if asked == 1 else 500, asked)


async def test_what_was_tried_is_known_when_the_flight_is_given_up(tmp_path: Any) -> None:
    (tmp_path / "outage").write_text("one hang")
    settings = configured(simulated_outage=tmp_path / "outage", simulated_journal=tmp_path / "calls", **TWO)
    chains, attempts = Chains(settings), list[Attempt]()
    asking = asyncio.create_task(ask(chains.of("response"), "chat/completions", BODY, settings, attempts=attempts))
    await faults_support.until(lambda: calls(tmp_path / "calls"), "the call is under way")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert told(attempts) == [("one:alpha:7b", "alpha:7b", "cancelled")]
    await chains.close()


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"providers": ["three:m"]}, "profile 'mine', providers, 'three:m': no provider 'three'"),
        ({"providers": ["one", "openai:gpt"]}, "profile 'mine', providers, 'openai:gpt': .*MILLPOND_OPENAI_API_KEY"),
        ({"resolver": "no_such_module:f"}, "the resolver 'no_such_module:f' of profile 'mine' cannot be imported"),
        ({"resolver": "math:pi"}, "is no function"),
        ({"resolver": "math:floor", "providers": ["one"]}, "both providers and a resolver"),
    ],
)
def test_a_chain_that_cannot_be_had_is_refused_at_start(profile: Any, says: str) -> None:
    settings = configured(**(TWO | {"profiles": {"mine": profile}, "provider": "simulated"}))
    with pytest.raises(ConfigError, match=says) as refusal:
        Chains(settings).check()
    assert str(refusal.value.field).startswith("profiles.mine.")


async def test_the_reply_names_who_answered_and_the_durable_tier_is_told_of_every_attempt(pond: Pond) -> None:
    outage = Outage(pond)
    outage.begin("one")
    pond.options |= TWO | {
        "attempts": 1,
        "prices": {"asked": {"input": 1e6, "output": 0.0}},
    }
    for names in pond.all_names():
        pond.redis.xgroup_create(names.landed, "persistence", "0", mkstream=True)
    async with pond.working("lookup", "llm"), pond.client() as client:
        reply = await client.ask("Who answers?", model="asked")
        again = await client.ask("Who answers?", model="asked")
        outage.begin()
        with pytest.raises(ProviderError):
            await client.ask("And now?", model="asked")
        await pond.settled()
    assert (reply.provider, reply.model, again.provider, again.model) == ("two", "asked", "two", "asked")
    (_, first), (_, second) = pond.redis.xrange(pond.names("x").landed)
    call, failed = orjson.loads(first[b"call"]), orjson.loads(second[b"call"])
    assert (first[b"outcome"], second[b"outcome"], b"entry" in second) == (b"stored", b"provider_error", False)
    assert told(call["attempts"]) == [("one:alpha:7b", "alpha:7b", "provider_error"), ("two", "asked", "ok")]
    assert (call["provider"], call["model"], call["kind"], call["cost"]) == ("two", "asked", "fill", call["tokens"][0])
    assert [one["provider"] for one in failed["attempts"]] == ["one:alpha:7b", "two"]
    assert (failed["tokens"], failed["profile"], failed["tenant"]) == ([0, 0], "response", "default")
