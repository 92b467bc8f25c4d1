"""The asynchronous client: publish a request, await its one outcome."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypedDict, Unpack

import orjson
from redis.exceptions import RedisError

from producers.channel import ReplyChannel
from producers.publisher import Outgoing, Publisher
from producers.reply import Reply, error_of
from shared.deployment import recorded
from shared.embedded import resolve_url
from shared.errors import DeadlineExceeded, InvalidRequest, Unavailable
from shared.keys import PartitionKeys
from shared.link import LINK_ERRORS, Link
from shared.messages import MAX_DEADLINE, Mode, Rules, label, seconds, tags_of
from shared.profiles import DEFAULT_PROFILE
from shared.scripts import SCRIPTS, Arg
from shared.settings import Settings, load

_ERROR = b'{"error"'
_KEY = re.compile("[0-9a-f]{32}")


class Directives(TypedDict, total=False):
    """What may be said of one request beside its body; see `Client.ask`. None is as good as nothing."""

    profile: str | None
    tenant: str | None
    mode: Mode | None
    ttl: float | None
    max_age: float | None
    tags: Sequence[str]
    scope: Mapping[str, str] | None


class Client:
    """A connection to a Millpond deployment, for one event loop.

        async with Client() as pond:
            reply = await pond.ask("What is a millpond?", model="gpt-4o-mini")

    `url` (else the settings' server, else the running embedded one) names the Redis server; `tenant` and `profile`
    are defaults for every request. Thousands of requests may wait at once on its two connections.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        tenant: str = "default",
        profile: str = DEFAULT_PROFILE,
    ) -> None:
        self._settings = settings or (load(redis_url=url) if url else load())
        self._url = url
        self._defaults: dict[str, Any] = {} if tenant == "default" else {"tenant": label(tenant, "tenant")}
        if profile != DEFAULT_PROFILE:
            self._defaults["profile"] = profile
        self._rules = Rules.of(self._settings)
        self._id = secrets.token_hex(8)
        self._count = 0
        self._waiting: dict[str, tuple[asyncio.Future[Reply], Outgoing]] = {}
        self._opening: asyncio.Lock | None = None
        self._link: Link | None = None
        self._channel: ReplyChannel | None = None
        self._publisher: Publisher | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connect now rather than at the first request.

        Raises:
            Unavailable: no server is configured or running, or none answers.
            ConfigError: the deployment was born otherwise than this client is configured.
        """
        if self._opening is None:
            self._opening = asyncio.Lock()
            # Kept: asking for the running loop is a system call.
            self._loop = asyncio.get_running_loop()
        async with self._opening:
            if self._publisher is not None:
                return
            url = self._url or resolve_url(self._settings)
            link = Link(url, name="millpond-client")
            channel = ReplyChannel(
                url,
                self._id,
                ttl=self._settings.channel_ttl,
                deliver=self._deliver,
                renewed=self._ask_again,
            )
            try:
                partitions = await recorded(link, self._settings.partitions)
                await channel.open()
            except (*LINK_ERRORS, RedisError) as error:
                await channel.close()
                await link.close()
                raise Unavailable(f"no Redis server answers: {error}; `millpond doctor` says more") from error
            except BaseException:
                await channel.close()
                await link.close()
                raise
            self._link, self._channel, self._born = link, channel, partitions is not None
            # Before any worker has started, any partition will do: workers hand over what is not theirs.
            assumed = partitions or self._settings.partitions or 1
            self._publisher = Publisher(link, assumed, self._rules, self._settings.request_limit)

    async def close(self) -> None:
        """Leave; whoever still waits gets `Unavailable`."""
        link, channel, publisher = self._link, self._channel, self._publisher
        self._link = self._channel = self._publisher = None
        for future, _ in list(self._waiting.values()):
            if not future.done():
                future.set_exception(Unavailable("the client was closed"))
        self._waiting.clear()
        if publisher is not None:
            publisher.close()
        if channel is not None:
            await channel.close()
            if link is not None:
                await channel.delete(link)
        if link is not None:
            await link.close()

    async def ask(
        self,
        /,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input: Any = None,  # noqa: A002 (the name of the API's own field)
        model: str | None = None,
        profile: str | None = None,
        tenant: str | None = None,
        mode: Mode | None = None,
        ttl: float | None = None,
        max_age: float | None = None,
        tags: Sequence[str] = (),
        scope: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> Reply:
        """Ask, and await the answer.

        Give a `prompt`, or OpenAI-style `messages`, or `input`; further `fields` go into the request's body as they
        are (and count in the key). `ttl` and `max_age` bound how long the answer may be served and how old a stored
        one may be, `timeout` how long to wait here, all in seconds. Without `model` the workers' default is asked.
        `mode`: `default`; `refresh` (recompute and store); `only-if-cached`; `no-store` (read, but do not store);
        `bypass` (neither).

        Raises:
            InvalidRequest: a field is wrong; `.field` names it.
            Overloaded: refused before it was accepted; `.retry_after` seconds.
            DeadlineExceeded: no outcome within `timeout`.
            NotCached: nothing is stored for an `only-if-cached` request.
            ProviderError: or one of its kinds, when the provider failed.
            Unavailable: no server could be reached to connect.
        """
        if (prompt is None) + (messages is None) + (input is None) != 2:
            raise InvalidRequest("give exactly one of prompt, messages or input", field="prompt")
        body: dict[str, Any] = {} if model is None else {"model": model}
        if prompt is not None:
            if not isinstance(prompt, str) or not prompt.strip():
                raise InvalidRequest("prompt must be a text, and not empty", field="prompt")
            body["messages"] = [{"role": "user", "content": prompt}]
        elif messages is not None:
            body["messages"] = messages
        else:
            body["input"] = input
        if fields:
            body.update(fields)
        return await self.ask_body(
            body,
            profile=profile,
            tenant=tenant,
            mode=mode,
            ttl=ttl,
            max_age=max_age,
            tags=tags,
            scope=scope,
            timeout=timeout,
        )

    async def ask_body(
        self, /, body: Mapping[str, Any] | bytes, *, timeout: float | None = None, **directives: Unpack[Directives]
    ) -> Reply:
        """Ask with an OpenAI-style body (a mapping, or its JSON), sent as it is. Otherwise as `ask`."""
        if self._publisher is None:
            await self.connect()
        encoded = body if isinstance(body, bytes) else self._encode(body, "body")
        if len(encoded) > self._settings.max_input_bytes:
            raise InvalidRequest(
                f"body has {len(encoded)} bytes; the limit is {self._settings.max_input_bytes}", field="body"
            )
        cache = self._encode_directives(directives)
        wait = (
            self._settings.timeout if timeout is None else seconds(timeout, "timeout", least=0.001, most=MAX_DEADLINE)
        )
        return await self._outcome(encoded, cache, wait)

    async def _outcome(self, body: bytes, cache: bytes, wait: float) -> Reply:
        assert self._publisher is not None and self._channel is not None  # noqa: S101 (ask_body connected)
        loop = self._loop
        self._count += 1
        request_id = f"{self._id}-{self._count:x}"
        future: asyncio.Future[Reply] = loop.create_future()
        deadline_ms = int((time.monotonic() + wait + self._channel.clock_offset) * 1000)
        outgoing = Outgoing(request_id, self._id, deadline_ms, body, cache, future)
        self._publisher.publish(outgoing)
        self._waiting[request_id] = future, outgoing
        expiry = loop.call_later(wait, self._expire, request_id, wait)
        try:
            return await future
        finally:
            expiry.cancel()
            self._waiting.pop(request_id, None)

    def _expire(self, request_id: str, wait: float) -> None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None and not waiting[0].done():
            waiting[0].set_exception(
                DeadlineExceeded(f"no answer within {wait:g} s: raise the timeout, or see `millpond doctor`")
            )

    def _deliver(self, request_id: str, payload: bytes) -> None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is None or waiting[0].done():
            return  # told before, expired, or cancelled
        if payload.startswith(_ERROR):
            waiting[0].set_exception(error_of(payload))
        else:
            waiting[0].set_result(Reply(payload, request_id))

    def _ask_again(self) -> None:
        """The server forgot this client: what it had accepted is gone too. Whoever still waits is published again."""
        if self._publisher is not None:
            for future, outgoing in self._waiting.values():
                if not future.done():
                    self._publisher.publish(outgoing)

    def _encode_directives(self, directives: Directives) -> bytes:
        wire = self._defaults | {name: value for name, value in directives.items() if value is not None}
        for name in ("ttl", "max_age"):
            if name in wire:
                seconds(wire[name], name, least=0.0)
        if tags := wire.pop("tags", None):
            wire["tags"] = [tags] if isinstance(tags, str) else list(tags)
        return self._encode(wire, "cache") if wire else b""

    @staticmethod
    def _encode(value: Mapping[str, Any], field: str) -> bytes:
        try:
            return orjson.dumps(value)
        except TypeError as error:
            raise InvalidRequest(f"{field} cannot be written as JSON: {error}", field=field) from None

    async def invalidate(
        self,
        *,
        tags: Sequence[str] = (),
        key: str | None = None,
        profile: str | None = None,
        tenant: str | None = None,
        model: str | None = None,
        everything: bool = False,
    ) -> dict[int, str]:
        """Forget every answer that carries any of what is named; return the log id per partition.

        Once it returns, no request published afterwards, by anyone, is answered from an entry or a computation that
        began before it.

        Raises:
            InvalidRequest: nothing, or something malformed, was named.
            Unavailable: not every partition's log holds it; call again (twice does no harm).
        """
        marked = list(tags_of([tags] if isinstance(tags, str) else list(tags)))
        if key is not None and not _KEY.fullmatch(key := key.lower()):
            raise InvalidRequest("key must be the 32 hexadecimal digits of a reply's `key`", field="key")
        named = {"key": key, "profile": profile, "tenant": tenant, "model": model}
        marked += [f"{name}:{label(value, name)}" for name, value in named.items() if value is not None]
        marked += ["all"] if everything else []
        if not marked:
            raise InvalidRequest("name what to forget: tags, key, profile, tenant, model or everything", field="tags")
        if self._publisher is None:
            await self.connect()
        assert self._publisher is not None and self._link is not None  # noqa: S101 (connected)
        args: list[Arg] = [self._id, self._settings.invalidation_limit, *marked]
        for attempt in range(4):
            with contextlib.suppress(*LINK_ERRORS, RedisError):
                logs = [PartitionKeys(p) for p in range(await self._partitions(self._link, self._publisher))]
                ids = await self._link.send([SCRIPTS["invalidate"].call([k.invalidations, k.tags], args) for k in logs])
                return {partition: entry.decode() for partition, entry in enumerate(ids)}
            await asyncio.sleep(0.05 * 2**attempt)
        raise Unavailable("the invalidation did not reach every partition: call again once Redis answers")

    async def _partitions(self, link: Link, publisher: Publisher) -> int:
        """Return how many partitions there are, asked again if no worker had started when this client did."""
        if not self._born and (partitions := await recorded(link, self._settings.partitions)) is not None:
            publisher.spread(partitions)
            self._born = True
        return publisher.partitions
