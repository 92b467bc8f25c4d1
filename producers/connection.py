"""What every request of a client goes through: one connection to publish on, one channel to be answered on."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Self, TypedDict

import orjson
from redis.exceptions import RedisError

from producers.channel import ReplyChannel
from producers.degraded import Degraded, Fallback
from producers.lead import ALONE, Alone, Grant, Leader
from producers.publisher import Outgoing, Publisher
from producers.reply import Reply, error_of
from shared.deployment import recorded
from shared.embedded import resolve_url
from shared.errors import DeadlineExceeded, InvalidRequest, Unavailable
from shared.link import LINK_ERRORS, Link
from shared.messages import MAX_DEADLINE, Mode, Rules, label, seconds
from shared.profiles import DEFAULT_PROFILE
from shared.settings import Settings, load

_ERROR, _LEAD, _AGAIN = b'{"error"', b'{"lead"', b'{"again"'
#: Seconds between two looks at whether the server is heard, and between two attempts to connect while it is not.
_LOOK = 0.1
_CONNECT_AGAIN = 1.0
#: Seconds for which leaving waits for what others wait for.
_PATIENCE = 1.0
_ELECTED = 4096


class Directives(TypedDict, total=False):
    """What may be said of one request beside its body; see `Client.ask`. None is as good as nothing."""

    profile: str | None
    tenant: str | None
    mode: Mode | None
    ttl: float | None
    max_age: float | None
    tags: Sequence[str]
    scope: Mapping[str, str] | None
    experiment: str | None
    variant: str | None
    unit: str | None


class Connection:
    """The base of `Client`: connects, publishes, matches replies to requests."""

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        tenant: str = "default",
        profile: str = DEFAULT_PROFILE,
        degraded: Degraded = "fail",
        degrade_after: float = 1.0,
    ) -> None:
        self._settings = settings or (load(redis_url=url) if url else load())
        self._url = url
        self._defaults: dict[str, Any] = {} if tenant == "default" else {"tenant": label(tenant, "tenant")}
        if profile != DEFAULT_PROFILE:
            self._defaults["profile"] = profile
        self._rules = Rules.of(self._settings)
        self._fallback = Fallback.make(degraded, degrade_after, self._settings, self._rules)
        self._id = secrets.token_hex(8)
        self._count = 0
        self._waiting: dict[str, Outgoing] = {}
        self._chores: set[asyncio.Task[Any]] = set()
        self._leading: set[Leader] = set()
        #: the newest elections somebody here was told of: a request published twice is elected twice
        self._elected: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._endings: set[asyncio.Task[Any]] = set()
        self._opening: asyncio.Lock | None = None
        self._link: Link | None = None
        self._channel: ReplyChannel | None = None
        self._publisher: Publisher | None = None
        self._watching: asyncio.Task[None] | None = None
        self._connect_again = 0.0

    async def __aenter__(self) -> Self:
        try:
            await self.connect()
        except Unavailable:
            if self._fallback is None:
                raise
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
            if self._fallback is not None:
                self._watching = asyncio.create_task(self._watch(channel, self._fallback))

    async def close(self) -> None:
        """Leave; whoever still waits gets `Unavailable`."""
        link, channel, publisher = self._link, self._channel, self._publisher
        self._link = self._channel = self._publisher = None
        for outgoing in list(self._waiting.values()):
            if not outgoing.future.done():
                outgoing.future.set_exception(Unavailable("the client was closed"))
        self._waiting.clear()
        if publisher is not None:
            publisher.close()
        for leader in list(self._leading):  # still computing: others go on without it
            self._finish(leader.fail(None))
        if self._endings:
            await asyncio.wait(self._endings, timeout=_PATIENCE)
        ending = [*self._chores, *self._endings, *([self._watching] if self._watching is not None else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        if self._fallback is not None:
            await self._fallback.close()
        if channel is not None:
            await channel.close()
            if link is not None:
                await channel.delete(link)
        if link is not None:
            await link.close()

    async def _connected(self) -> tuple[Link, Publisher]:
        if self._publisher is None:
            await self.connect()
        assert self._publisher is not None and self._link is not None  # noqa: S101 (connect raises otherwise)
        return self._link, self._publisher

    async def _partitions(self) -> int:
        """Return how many partitions there are, asked again if no worker had started when this client did."""
        link, publisher = await self._connected()
        if not self._born and (partitions := await recorded(link, self._settings.partitions)) is not None:
            publisher.spread(partitions)
            self._born = True
        return publisher.partitions

    # one request

    async def _request(
        self,
        body: bytes,
        directives: Mapping[str, Any],
        timeout: float | None,
        *,
        lead: bool = False,
        knocks: bool = False,
    ) -> Reply | Grant | Alone:
        """Publish one request; return its outcome. With `lead` that may be the task to compute it.

        With `knocks` it is asked again each lease: an application that computes it may die.

        Raises:
            MillpondError: its outcome is an error.
        """
        if self._publisher is None:
            await self._connect_or_fall_back()
        if len(body) > self._settings.max_input_bytes:
            raise InvalidRequest(
                f"body has {len(body)} bytes; the limit is {self._settings.max_input_bytes}", field="body"
            )
        cache = self._encode_directives(directives, lead=lead)
        wait = self._wait(timeout)
        self._count += 1
        request_id = f"{self._id}-{self._count:x}"
        future: asyncio.Future[Reply | Grant | Alone] = self._loop.create_future()
        offset = self._channel.clock_offset if self._channel is not None else 0.0
        deadline_ms = int((time.monotonic() + wait + offset) * 1000)
        outgoing = Outgoing(request_id, self._id, deadline_ms, body, cache, future, lead)
        if self._fallback is not None and (self._fallback.active or self._publisher is None):
            self._divert(outgoing, self._fallback)
        else:
            self._publish(outgoing)
        expiry = self._loop.call_later(wait, _expire, outgoing, wait)
        if knocks:
            self._knock_later(outgoing)
        try:
            return await future
        except asyncio.CancelledError:
            # Elected in the very turn it was cancelled: handed on like any other.
            if future.done() and not future.cancelled() and future.exception() is None:
                outcome = future.result()
                if isinstance(outcome, Grant):
                    self._decline(outcome)
            raise
        finally:
            expiry.cancel()
            if outgoing.knock is not None:
                outgoing.knock.cancel()
            self._waiting.pop(request_id, None)
            if future.cancelled() or not future.done():
                outgoing.withdrawn = True

    def _wait(self, timeout: float | None) -> float:
        return (
            self._settings.timeout if timeout is None else seconds(timeout, "timeout", least=0.001, most=MAX_DEADLINE)
        )

    def _publish(self, outgoing: Outgoing) -> None:
        assert self._publisher is not None  # noqa: S101 (connected)
        if self._fallback is not None:
            outgoing.clock = self._fallback.clock
        self._publisher.publish(outgoing)
        self._waiting[outgoing.request_id] = outgoing

    def _knock(self, outgoing: Outgoing) -> None:
        """Ask again each lease for what another application computes: if it died, the first to knock takes over."""
        if outgoing.request_id in self._waiting and self._publisher is not None:
            outgoing.repeated = True  # it waits already: no room for a knock is no refusal
            self._publisher.publish(outgoing)
            self._knock_later(outgoing)

    def _knock_later(self, outgoing: Outgoing) -> None:
        wait = self._settings.compute_lease * random.uniform(1.0, 1.2)
        outgoing.knock = self._loop.call_later(wait, self._knock, outgoing)

    def _deliver(self, request_id: str, payload: bytes) -> None:
        if payload.startswith(_AGAIN):
            if request_id in self._waiting and self._publisher is not None:
                self._publisher.publish(self._waiting[request_id])
            return
        outgoing = self._waiting.pop(request_id, None)
        if payload.startswith(_LEAD):
            self._elect(payload, outgoing)
        elif outgoing is None or outgoing.future.done():
            return  # told before, expired, or cancelled
        elif payload.startswith(_ERROR):
            outgoing.future.set_exception(error_of(payload))
        else:
            reply = Reply(payload, request_id)
            if self._fallback is not None:
                self._fallback.remember(reply, outgoing.clock)
            outgoing.future.set_result(reply)

    def _elect(self, payload: bytes, outgoing: Outgoing | None) -> None:
        try:
            grant = Grant.read(payload)
        except (ValueError, KeyError, TypeError):  # written by other hands
            return
        flight = grant.key, grant.token  # tokens are told apart within a partition only
        if flight in self._elected:
            return
        self._elected[flight] = None
        if len(self._elected) > _ELECTED:
            self._elected.popitem(last=False)
        if outgoing is None or outgoing.future.done():
            self._decline(grant)
        else:
            outgoing.future.set_result(grant)

    def _decline(self, grant: Grant) -> None:
        """Nobody is here to compute it any more: the next of those who wait is elected at once."""
        if self._link is not None:
            self._finish(Leader(self._link, grant, self._settings).fail(None))

    def _ask_again(self) -> None:
        """The server forgot this client: what it had accepted is gone too. Whoever still waits is published again."""
        if self._publisher is not None:
            for outgoing in self._waiting.values():
                if not outgoing.future.done():
                    self._publisher.publish(outgoing)

    def _finish(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Write something others wait for: in the background, and before the client is closed."""
        return _kept(work, self._endings)

    def _encode_directives(self, directives: Mapping[str, Any], *, lead: bool = False) -> bytes:
        wire = self._defaults | {name: value for name, value in directives.items() if value is not None}
        for name, least in (("ttl", 0.001), ("max_age", 0.0)):
            if name in wire:
                seconds(wire[name], name, least=least)
        if tags := wire.pop("tags", None):
            wire["tags"] = [tags] if isinstance(tags, str) else list(tags)
        if lead:
            wire["lead"] = True
        return self._encode(wire, "cache") if wire else b""

    @staticmethod
    def _encode(value: Mapping[str, Any], field: str) -> bytes:
        try:
            return orjson.dumps(value)
        except TypeError as error:
            raise InvalidRequest(f"{field} cannot be written as JSON: {error}", field=field) from None

    # while Redis cannot be reached

    async def _connect_or_fall_back(self) -> None:
        now = time.monotonic()
        if self._fallback is not None and now < self._connect_again:
            return
        try:
            await self.connect()
        except Unavailable:
            if self._fallback is None:
                raise
            self._connect_again = now + _CONNECT_AGAIN

    async def _watch(self, channel: ReplyChannel, fallback: Fallback) -> None:
        """Notice that the server is not heard, and that it is again."""
        while True:
            began = self._loop.time()
            await asyncio.sleep(_LOOK)
            away = channel.silence() > fallback.after
            if away and self._loop.time() - began > 2 * _LOOK:
                continue  # this loop was held up: what the server said meanwhile is yet to be read
            fallback.active = away
            if fallback.active:
                for outgoing in list(self._waiting.values()):
                    self._divert(outgoing, fallback)

    def _divert(self, outgoing: Outgoing, fallback: Fallback) -> None:
        """Answer a request without Redis; whatever comes for it later is dropped."""
        self._waiting.pop(outgoing.request_id, None)
        outgoing.withdrawn = True
        task = _kept(self._answer_alone(outgoing, fallback), self._chores)
        outgoing.future.add_done_callback(lambda _: task.cancel())  # who has left needs no answer

    async def _answer_alone(self, outgoing: Outgoing, fallback: Fallback) -> None:
        future = outgoing.future
        try:
            reply = await fallback.answer(outgoing)
        except Exception as error:
            if not future.done():
                future.set_exception(error)
        except asyncio.CancelledError:
            if not future.done():
                future.set_exception(Unavailable("the client was closed"))
            raise
        else:
            if not future.done():
                future.set_result(reply if reply is not None else ALONE)


def _kept(work: Coroutine[Any, Any, Any], among: set[asyncio.Task[Any]]) -> asyncio.Task[Any]:
    """Do something in the background; until it is done it stands among those that closing ends."""
    task = asyncio.create_task(work)
    among.add(task)
    task.add_done_callback(among.discard)
    return task


def _expire(outgoing: Outgoing, wait: float) -> None:
    if not outgoing.future.done():
        outgoing.future.set_exception(
            DeadlineExceeded(f"no answer within {wait:g} s: raise the timeout, or see `millpond doctor`")
        )
