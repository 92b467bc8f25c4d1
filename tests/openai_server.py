"""A stand-in for a provider: a small HTTP server that speaks as much of the OpenAI protocol as the tests need.

It is no model and no fake of Redis or of our own code: it plays the network's other end, over a real socket, so that
statuses, headers, slowness and broken connections reach the official SDK as they would from a provider.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.providers import Provider, make_provider
from shared.settings import Settings

#: Spaced and ordered as no serialiser of ours would: a body that was parsed and written again is not equal to it.
GOOD = (
    b'{ "model": "stub-1",\n "id":"chatcmpl-stub", "object":"chat.completion",  "x_vendor": {"kept": 1.50},\n'
    b' "choices": [ {"finish_reason":"stop","index":0,"message":{"content":"caf\\u00e9","role":"assistant"}} ],\n'
    b' "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10} }\n'
)


KEY = "sk-test-0123456789"
CHAT = {"model": "stub-1", "messages": [{"role": "user", "content": "Where is my parcel?"}]}


@dataclass(frozen=True)
class Scripted:
    """One scripted answer: sent `delay` seconds after the request; `cut` breaks the connection instead."""

    status: int = 200
    body: bytes | Mapping[str, Any] = GOOD
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: Literal["", "unanswered", "mid-body"] = ""


def refusal(status: int, message: str, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Scripted:
    """Return an answer in the form of an OpenAI error."""
    return Scripted(status, {"error": {"message": message, **fields}}, headers or {})


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class OpenAIServer:
    """Serves `script`, one entry a request, then `GOOD` for ever. An async context manager; `url` ends in `/v1`."""

    def __init__(self, script: Iterable[Scripted] = ()) -> None:
        self._script = list(script)
        self._connections: set[asyncio.Task[None]] = set()
        self.seen: list[Seen] = []
        self.arrived = asyncio.Event()
        self.hung_up = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> OpenAIServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._serve(reader, writer):
                    pass
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; return whether the connection stays."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.seen.append(Seen(head[0].split()[1], headers, json.loads(body)))
        self.arrived.set()
        answer = self._script.pop(0) if self._script else Scripted()
        if answer.delay and await _hangs_up(reader, answer.delay):
            self.hung_up.set()
            return False
        if answer.cut == "unanswered":
            return False
        writer.write(_rendered(answer))
        await writer.drain()
        return answer.cut != "mid-body"


async def _hangs_up(reader: asyncio.StreamReader, within: float) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), within) == b""
    except TimeoutError:
        return False


def _rendered(answer: Scripted) -> bytes:
    body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | dict(answer.headers)
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    sent = body[: len(body) // 2] if answer.cut == "mid-body" else body
    return f"HTTP/1.1 {answer.status} Scripted\r\n{head}\r\n".encode() + sent


def configured(**fields: Any) -> Settings:
    """Return settings whose retries take no time to speak of."""
    quick = {"backoff_initial": 0.01, "backoff_max": 0.05, "attempt_timeout": 5.0, "total_timeout": 10.0}
    return Settings(**{**quick, **fields})


@asynccontextmanager
async def provider_of(settings: Settings) -> AsyncIterator[Provider]:
    """A provider, closed at the end."""
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
