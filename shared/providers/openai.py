"""OpenAI, and whatever speaks its protocol: Azure, vLLM, Ollama, OpenRouter, a proxy.

The official SDK does the talking. The body goes out with every field the application sent and the answer comes back
byte for byte; the SDK's own retries are off, `retry.py` decides about those.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import openai
import orjson

from shared.errors import (
    ConfigError,
    ContentFiltered,
    ProviderError,
    ProviderTimeout,
    ProviderUnreachable,
    RateLimited,
)
from shared.providers.base import Call, Completion
from shared.settings import Endpoint, Settings

NAME = "openai"

#: Error codes by which providers refuse content: OpenAI's, then Azure's.
_FILTERED = frozenset(
    {"content_filter", "content_policy_violation", "moderation_blocked", "ResponsibleAIPolicyViolation"}
)
#: A 429 that no waiting cures.
_UNPAID = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_CONNECT_TIMEOUT = 5.0
_LONGEST_MESSAGE = 500


class OpenAIProvider:
    """The OpenAI API at `openai_base_url`, or at a named endpoint.

    An endpoint of another address is never shown the deployment's own key.

    Raises:
        ConfigError: neither a key nor a base URL (local servers need no key) is configured.
    """

    def __init__(self, settings: Settings, name: str = NAME, endpoint: Endpoint | None = None) -> None:
        self.name = name
        self._key, address = settings.api_key, settings.openai_base_url
        if endpoint is not None:
            if endpoint.base_url is not None:
                self._key, address = None, endpoint.base_url
            if endpoint.api_key is not None:
                self._key = endpoint.api_key.get_secret_value()
        self._address = "MILLPOND_OPENAI_BASE_URL" if endpoint is None else f"base_url in [providers.{name}]"
        self._key_setting = "MILLPOND_OPENAI_API_KEY" if endpoint is None else f"api_key in [providers.{name}]"
        if self._key is None and address is None:
            raise ConfigError(
                "the openai provider needs a key: set MILLPOND_OPENAI_API_KEY, or MILLPOND_OPENAI_BASE_URL for a "
                "server that asks for none, or MILLPOND_PROVIDER=simulated to try Millpond without one",
                field="openai_api_key",
            )
        self._client = openai.AsyncOpenAI(api_key=self._key or "none", base_url=address, max_retries=0)

    async def complete(self, call: Call) -> Completion:
        """Answer one call; cancelling it closes the HTTP request.

        Raises:
            ProviderError: see `error_of`; also for an answer that is not JSON, which no retry would cure.
        """
        try:
            async with asyncio.timeout(call.timeout) as scope:
                body = await self._post(call)
        except TimeoutError:
            if not scope.expired():
                raise
            raise self._too_slow(call.timeout) from None
        except openai.APITimeoutError:
            raise self._too_slow(call.timeout) from None
        except openai.APIConnectionError as error:
            raise ProviderUnreachable(
                f"no connection to {self._client.base_url}, or it broke ({error.__cause__ or error}); check the "
                f"network and {self._address}",
                provider=self.name,
            ) from error
        except openai.APIStatusError as error:
            raise self._refused(error.status_code, error.body, error.response.headers) from error
        return self._read(body, call)

    async def close(self) -> None:
        """Close the HTTP connections. Safe to call twice."""
        await self._client.close()

    async def _post(self, call: Call) -> bytes:
        timeout = openai.Timeout(call.timeout, connect=min(call.timeout, _CONNECT_TIMEOUT))
        response = await self._client.post(
            f"/{call.endpoint}",
            cast_to=openai.HttpxBinaryResponseContent,  # as it came, whichever HTTP library this SDK is built on
            body=call.body,
            options={"timeout": timeout},
        )
        return response.content

    def _read(self, body: bytes, call: Call) -> Completion:
        try:
            completion = Completion.read(body)
        except ValueError as error:
            raise ProviderError(
                f"{self.name} answered 200, but not with a JSON object ({error}); check that {self._address} "
                "is the API's address, usually ending in /v1",
                status=200,
                provider=self.name,
            ) from None
        answer = orjson.loads(body)
        if isinstance(answer.get("error"), dict) and not {"choices", "output", "data"} & answer.keys():
            code = answer["error"].get("code")  # some routers report their upstream's failure with status 200
            raise self._refused(code if isinstance(code, int) else 200, answer["error"], {})
        return completion

    def _refused(self, status: int, body: object, headers: Mapping[str, str]) -> ProviderError:
        error = error_of(status, body, headers, name=self.name, check=(self._key_setting, self._address))
        if self._key:
            error.message = error.message.replace(self._key, "***")
            error.args = (error.message,)
        return error

    def _too_slow(self, timeout: float) -> ProviderTimeout:
        return ProviderTimeout(
            f"{self.name} gave no answer within {timeout:.3g} s; if it is merely slow, raise MILLPOND_ATTEMPT_TIMEOUT",
            provider=self.name,
        )


def error_of(
    status: int,
    body: object,
    headers: Mapping[str, str],
    now: float | None = None,
    *,
    name: str = NAME,
    check: tuple[str, str] = ("MILLPOND_OPENAI_API_KEY", "MILLPOND_OPENAI_BASE_URL"),
) -> ProviderError:
    """Return the typed error for an HTTP status, the `error` object of its body (or its text), and its headers.

    429 is `RateLimited`, save for an exhausted quota, which no retry cures; refused content is `ContentFiltered`;
    all else is a `ProviderError` with its status. `now` is the time (seconds since the epoch) a dated Retry-After
    counts from; `check` are the settings that hold the key and the address.
    """
    fields = body if isinstance(body, dict) else {}
    said = fields.get("message") if isinstance(fields.get("message"), str) else body if isinstance(body, str) else ""
    message = f"{name} answered {status}: {str(said).strip()[:_LONGEST_MESSAGE] or 'without a message'}"
    codes = {str(fields.get("code")), str(fields.get("type")), _inner_code(fields)}
    if codes & _FILTERED and status < 500:
        return ContentFiltered(f"{message}; change the content and ask again", status=status, provider=name)
    if codes & _UNPAID:  # without its status: by that it would count as retryable
        return ProviderError(f"{message}; add credit or use another key", provider=name)
    wait = retry_after(headers, time.time() if now is None else now)
    if status == 429:
        return RateLimited(message, status=status, provider=name, retry_after=wait)
    if status in (401, 403):
        message += f"; check {check[0]} and what it may use"
    elif status == 404:
        message += f"; check the model's name and {check[1]}"
    return ProviderError(message, status=status, provider=name, retry_after=wait)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds a provider asks to wait (`retry-after-ms`, `retry-after` in seconds or as a date), or None."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / scale
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - now, 0.0)
    except (TypeError, ValueError, OverflowError):
        return None


def _inner_code(fields: dict[str, Any]) -> str:
    inner = fields.get("innererror")
    return str(inner.get("code")) if isinstance(inner, dict) else ""
