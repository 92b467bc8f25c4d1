"""The openai provider over real sockets, and what importing the providers costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from shared.errors import (
    ConfigError,
    ContentFiltered,
    ProviderError,
    ProviderTimeout,
    ProviderUnreachable,
    RateLimited,
)
from shared.providers import Call, Completion, make_provider
from shared.providers.openai import retry_after
from tests.openai_server import CHAT, GOOD, KEY, OpenAIServer, Scripted, configured, provider_of, refusal, scripted
from tests.processes import our_code_environment


@pytest.mark.parametrize("endpoint", ["chat/completions", "responses", "embeddings"])
async def test_a_body_travels_unchanged_and_comes_back_byte_for_byte(endpoint: str) -> None:
    body = CHAT | {"top_k": 40, "vendor": {"nested": [1, None, "é"]}, "temperature": 0.0, "encoding_format": None}
    async with scripted() as (server, provider):
        completion = await provider.complete(Call(endpoint, body | {"stream": True, "stream_options": {"x": 1}}))
    assert completion == Completion(GOOD, 7, 3)
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
    run = subprocess.run(
        [sys.executable, "-c", program], env=our_code_environment(), capture_output=True, text=True, check=True
    )
    assert absent.isdisjoint(run.stdout.split())
