"""Providers over real sockets, retries by real attempts, the simulated provider by its own journal."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from shared.answers import text_of
from shared.errors import (
    ConfigError,
    ContentFiltered,
    ProviderError,
    ProviderTimeout,
    ProviderUnreachable,
    RateLimited,
)
from shared.providers import Call, Completion, Provider, make_provider
from shared.providers.openai import retry_after
from shared.providers.prose import tokens
from shared.providers.retry import with_retries
from shared.providers.simulated import calls, embed
from shared.settings import Settings
from tests.openai_server import GOOD, OpenAIServer, Scripted, refusal

OURS = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
KEY = "sk-test-0123456789"
CHAT = {"model": "stub-1", "messages": [{"role": "user", "content": "Where is my parcel?"}]}


def configured(**fields: Any) -> Settings:
    quick = {"backoff_initial": 0.01, "backoff_max": 0.05, "attempt_timeout": 5.0, "total_timeout": 10.0}
    return Settings(**{**quick, **fields})


@asynccontextmanager
async def provider_of(settings: Settings) -> AsyncIterator[Provider]:
    provider = make_provider(settings)
    try:
        yield provider
    finally:
        await provider.close()


@asynccontextmanager
async def scripted(*script: Scripted) -> AsyncIterator[tuple[OpenAIServer, Provider]]:
    """A server that follows the script, and a provider that talks to it."""
    async with (
        OpenAIServer(script) as server,
        provider_of(configured(openai_base_url=server.url, openai_api_key=KEY)) as provider,
    ):
        yield server, provider


# --- the openai provider ---


@pytest.mark.parametrize("endpoint", ["chat/completions", "responses", "embeddings"])
async def test_a_body_travels_unchanged_and_comes_back_byte_for_byte(endpoint: str) -> None:
    body = CHAT | {"top_k": 40, "vendor": {"nested": [1, None, "é"]}, "temperature": 0.0, "encoding_format": None}
    async with scripted() as (server, provider):
        completion = await provider.complete(Call(endpoint, body | {"stream": True, "stream_options": {"x": 1}}))
    assert completion == Completion(GOOD, "stub-1", 7, 3, ("stop",))
    assert (server.seen[0].path, server.seen[0].body) == (f"/v1/{endpoint}", body)
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("answer", "kind", "status", "wait", "retryable"),
    [
        (refusal(429, "slow down", headers={"retry-after": "7"}), RateLimited, 429, 7.0, True),
        (refusal(429, "slow down", headers={"retry-after-ms": "250"}), RateLimited, 429, 0.25, True),
        (refusal(429, "slow down"), RateLimited, 429, None, True),
        (refusal(429, "no credit", code="insufficient_quota"), ProviderError, None, None, False),
        (refusal(500, "oops"), ProviderError, 500, None, True),
        (refusal(503, "busy", headers={"retry-after": "2"}), ProviderError, 503, 2.0, True),
        (Scripted(502, b"<html>Bad gateway</html>"), ProviderError, 502, None, True),
        (refusal(400, "bad field"), ProviderError, 400, None, False),
        (refusal(401, f"Incorrect API key provided: {KEY}"), ProviderError, 401, None, False),
        (refusal(404, "no such model"), ProviderError, 404, None, False),
        (refusal(400, "filtered", code="content_filter"), ContentFiltered, 400, None, False),
        (refusal(400, "no", innererror={"code": "ResponsibleAIPolicyViolation"}), ContentFiltered, 400, None, False),
        (Scripted(200, b"<html>a login page</html>"), ProviderError, 200, None, False),
        (refusal(200, "upstream is rate limited", code=429), RateLimited, 429, None, True),
    ],
)  # fmt: skip
async def test_every_refusal_has_its_type(
    answer: Scripted, kind: type[ProviderError], status: int | None, wait: float | None, retryable: bool
) -> None:
    async with scripted(answer) as (_, provider):
        with pytest.raises(ProviderError) as caught:
            await provider.complete(Call("chat/completions", CHAT))
    error = caught.value
    assert (type(error), error.status, error.retry_after, error.retryable) == (kind, status, wait, retryable)
    assert error.provider == "openai"
    assert KEY not in str(error) + error.message


@pytest.mark.parametrize("cut", ["unanswered", "mid-body"])
async def test_a_broken_connection_is_unreachable(cut: Any) -> None:
    async with scripted(Scripted(cut=cut)) as (_, provider):
        with pytest.raises(ProviderUnreachable, match="MILLPOND_OPENAI_BASE_URL"):
            await provider.complete(Call("chat/completions", CHAT))


async def test_a_closed_port_is_unreachable() -> None:
    async with OpenAIServer() as server:
        url = server.url
    async with provider_of(configured(openai_base_url=url)) as provider:
        with pytest.raises(ProviderUnreachable):
            await provider.complete(Call("chat/completions", CHAT))


async def test_a_slow_answer_times_out_and_its_request_is_closed() -> None:
    async with scripted(Scripted(delay=30)) as (server, provider):
        with pytest.raises(ProviderTimeout, match=r"0\.2 s"):
            await provider.complete(Call("chat/completions", CHAT, timeout=0.2))
        await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_cancelling_a_call_closes_its_request() -> None:
    async with scripted(Scripted(delay=30)) as (server, provider):
        call = asyncio.create_task(provider.complete(Call("chat/completions", CHAT)))
        await asyncio.wait_for(server.arrived.wait(), 5)
        call.cancel()
        await asyncio.wait_for(server.hung_up.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await call


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:02:00 GMT"}, 20.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "9", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "9", "retry-after-ms": "soon"}, 9.0),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "later"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=100.0) == seconds


def test_a_missing_key_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="MILLPOND_OPENAI_API_KEY"):
        make_provider(configured(provider="openai"))


# --- retries ---


async def retried(provider: Provider, settings: Settings, **hooks: Any) -> Completion:
    return await with_retries(
        lambda seconds: provider.complete(Call("chat/completions", CHAT, seconds)),
        settings,
        provider=provider.name,
        **hooks,
    )


async def test_a_retryable_error_is_tried_again() -> None:
    attempts: list[int] = []
    errors: list[ProviderError] = []
    script = refusal(500, "oops"), Scripted(cut="unanswered"), refusal(429, "slow down"), Scripted()
    async with scripted(*script) as (server, provider):
        completion = await retried(provider, configured(), on_attempt=attempts.append, on_error=errors.append)
    assert (completion.body, len(server.seen)) == (GOOD, 4)
    assert attempts == [1, 2, 3, 4]
    assert [type(error) for error in errors] == [ProviderError, ProviderUnreachable, RateLimited]


async def test_an_error_of_the_caller_is_never_tried_again() -> None:
    async with scripted(refusal(400, "bad field")) as (server, provider):
        with pytest.raises(ProviderError, match="bad field"):
            await retried(provider, configured())
    assert len(server.seen) == 1


async def test_the_last_error_is_raised_when_attempts_are_used_up() -> None:
    async with scripted(refusal(500, "first"), refusal(503, "second"), Scripted()) as (server, provider):
        with pytest.raises(ProviderError, match="second"):
            await retried(provider, configured(attempts=2))
    assert len(server.seen) == 2


async def test_retry_after_is_waited_for() -> None:
    async with scripted(refusal(429, "slow down", headers={"retry-after-ms": "300"})) as (_, provider):
        began = time.monotonic()
        await retried(provider, configured(), chance=random.Random(1))
    assert 0.3 <= time.monotonic() - began < 3


async def test_a_retry_after_beyond_the_time_left_fails_at_once() -> None:
    async with scripted(refusal(429, "slow down", headers={"retry-after": "60"})) as (server, provider):
        began = time.monotonic()
        with pytest.raises(RateLimited) as caught:
            await retried(provider, configured())
    assert time.monotonic() - began < 3
    assert (caught.value.retry_after, len(server.seen)) == (60.0, 1)


async def test_a_back_off_beyond_the_time_left_fails_at_once_with_the_provider_s_error() -> None:
    async with scripted(refusal(500, "oops")) as (_, provider):
        began = time.monotonic()
        with pytest.raises(ProviderError, match="oops"):
            await retried(provider, configured(backoff_initial=60, backoff_max=60))
    assert time.monotonic() - began < 3


async def test_a_slow_attempt_is_cut_and_the_next_one_answers() -> None:
    async with scripted(Scripted(delay=30), Scripted()) as (server, provider):
        completion = await retried(provider, configured(attempt_timeout=0.3))
        await asyncio.wait_for(server.hung_up.wait(), 5)
    assert completion.body == GOOD


async def test_the_total_time_out_ends_everything_and_names_the_last_error() -> None:
    script = [refusal(500, "oops"), Scripted(delay=30)]
    async with scripted(*script) as (_, provider):
        with pytest.raises(ProviderTimeout, match=r"0\.5 s in all after 2 attempts .*oops.*MILLPOND_TOTAL_TIMEOUT"):
            await retried(provider, configured(), total_timeout=0.5)


async def test_an_attempt_that_never_ends_is_cut_by_the_loop_itself() -> None:
    async def attempt(_: float) -> None:
        await asyncio.Event().wait()

    with pytest.raises(ProviderTimeout, match=r"gave no answer within 0\.05 s"):
        await with_retries(attempt, configured(attempt_timeout=0.05, attempts=2), provider="p")


async def test_cancellation_ends_the_retries() -> None:
    failed = asyncio.Event()
    async with scripted(*[refusal(500, "oops")] * 3) as (server, provider):
        settings = configured(backoff_initial=5, backoff_max=5, total_timeout=60)
        task = asyncio.create_task(retried(provider, settings, on_error=lambda _: failed.set()))
        await asyncio.wait_for(failed.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(server.seen) == 1


async def test_time_up_while_waiting_for_admission_is_a_rate_limit() -> None:
    async def attempt(_: float) -> None:
        raise AssertionError("was never admitted")

    with pytest.raises(RateLimited, match="MILLPOND_REQUESTS_PER_MINUTE"):
        await with_retries(attempt, configured(), provider="p", total_timeout=0.1, admit=lambda: asyncio.Event().wait())


# --- the simulated provider ---


def simulated(**fields: Any) -> Provider:
    quick = {"simulated_first_token": 0.0, "simulated_tokens_per_second": 1e9, "provider": "simulated"}
    return make_provider(Settings(**{**quick, **fields}))


async def ask(provider: Provider, endpoint: str = "chat/completions", **fields: Any) -> dict[str, Any]:
    body = fields or {"messages": CHAT["messages"], "model": "m"}
    answer: dict[str, Any] = json.loads((await provider.complete(Call(endpoint, body))).body)
    return answer


async def test_without_a_key_the_provider_is_simulated_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    provider = simulated(provider="auto")
    answer = await ask(provider)
    assert provider.name == "simulated"
    assert all("simulated" in answer[name] for name in ("id", "model", "system_fingerprint"))


async def test_the_same_request_has_the_same_text_and_another_one_another() -> None:
    one, other = simulated(), simulated()
    body: dict[str, Any] = {"model": "m", "messages": CHAT["messages"], "temperature": 0.5}
    texts = [text_of(await ask(one, **body)), text_of(await ask(other, **dict(reversed(body.items()))))]
    assert texts[0] == texts[1]
    assert "parcel" in texts[0]
    assert text_of(await ask(one, **body | {"temperature": 0.6})) != texts[0]


async def test_max_tokens_cuts_the_answer_and_usage_counts_it() -> None:
    whole = await ask(simulated())
    cut = await ask(simulated(), model="m", messages=CHAT["messages"], max_tokens=9)
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == len(tokens(text_of(whole)))
    assert abs(whole["usage"]["completion_tokens"] - 120) < 40
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 9)
    assert cut["usage"]["total_tokens"] == cut["usage"]["prompt_tokens"] + 9


async def test_the_official_sdk_s_types_accept_all_three_shapes() -> None:
    provider = simulated()
    chat = ChatCompletion.model_validate(await ask(provider, model="m", messages=CHAT["messages"], n=2))
    response = Response.model_validate(
        await ask(provider, "responses", model="m", input="Where is it?", max_output_tokens=5)
        | {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
    )
    vectors = CreateEmbeddingResponse.model_validate(
        await ask(provider, "embeddings", model="m", input=["a b", "c"], dimensions=16)
    )
    assert chat.choices[0].message.content != chat.choices[1].message.content
    assert (response.status, len(tokens(response.output_text))) == ("incomplete", 5)
    assert [len(item.embedding) for item in vectors.data] == [16, 16]


def test_texts_that_share_words_lie_close_together() -> None:
    def close(one: str, other: str) -> float:
        return sum(x * y for x, y in zip(embed(one, 1536), embed(other, 1536), strict=True))

    assert close("how do I reset my password", "How can I reset my password?") > 0.6
    assert close("how do I reset my password", "notary fees in Hamburg") < 0.2
    assert abs(close("", "") - 1) < 1e-6


async def test_a_call_is_in_the_journal_before_it_is_answered(tmp_path: Path) -> None:
    journal = tmp_path / "new" / "calls.jsonl"
    provider = simulated(simulated_first_token=60.0, simulated_journal=journal)
    assert calls(journal) == []
    task = asyncio.create_task(ask(provider))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (call,) = calls(journal)
    assert (call["prompt"], call["endpoint"]) == ("Where is my parcel?", "chat/completions")


def test_journal_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    journal = tmp_path / "calls.jsonl"
    program = f"""
import asyncio
from shared.providers import Call, make_provider
from shared.settings import Settings
provider = make_provider(Settings(provider="simulated", simulated_first_token=0, simulated_journal={str(journal)!r},
                                  simulated_tokens_per_second=1e9, simulated_tokens=1))
async def main():
    for n in range(200):
        await provider.complete(Call("responses", {{"input": f"question {{n}} " + "x" * 200}}))
asyncio.run(main())
"""
    workers = [subprocess.Popen([sys.executable, "-c", program], env=OURS) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    seen = calls(journal)
    assert len(seen) == 600
    assert len({call["pid"] for call in seen}) == 3
    assert len({call["sha"] for call in seen}) == 200


async def test_failures_are_the_same_ones_for_the_same_seed() -> None:
    async def failures(seed: int) -> list[int]:
        provider, failed = simulated(simulated_failure_rate=0.3, simulated_seed=seed), []
        for at in range(40):
            try:
                await ask(provider)
            except ProviderError as error:
                assert (error.status, error.retryable) == (503, True)
                failed.append(at)
        return failed

    assert await failures(1) == await failures(1) != await failures(2)
    assert 4 <= len(await failures(1)) <= 20


async def test_an_answer_takes_the_time_its_tokens_take() -> None:
    provider = simulated(simulated_first_token=0.1, simulated_tokens_per_second=100.0, simulated_tokens=10)
    began = time.monotonic()
    answer = await ask(provider, model="m", messages=CHAT["messages"], max_tokens=10)
    assert answer["usage"]["completion_tokens"] == 10
    assert 0.2 <= time.monotonic() - began < 2


# --- what is imported when ---


@pytest.mark.parametrize(
    ("imports", "absent"),
    [
        ("shared.answers", {"orjson", "redis", "pydantic", "openai"}),
        ("shared.providers, shared.providers.gate", {"openai", "stamina", "limits", "zstandard"}),
        ("shared.providers.limits, shared.providers.simulated", {"openai", "limits"}),
    ],
)
def test_a_heavy_library_is_imported_only_by_what_needs_it(imports: str, absent: set[str]) -> None:
    program = f"import sys, {imports}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], env=OURS, capture_output=True, text=True, check=True)
    assert absent.isdisjoint(run.stdout.split())
