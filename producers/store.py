"""Plain get, put, exists, delete and info, for applications that compute, and manage their misses, themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from producers.connection import Connection
from producers.reply import Reply
from shared.envelope import Unreadable, opened
from shared.errors import InvalidRequest, NotCached, Superseded, Unavailable
from shared.keys import PartitionKeys, partition_of
from shared.link import LINK_ERRORS, Command
from shared.messages import Question, understand
from shared.scripts import SCRIPTS, Arg
from shared.values import APPLICATION, Encoded, encode

#: How much of an entry `info` reads: 32 tags of 200 characters, and the meta line.
_HEAD = 16_384


@dataclass(frozen=True, slots=True)
class Found:
    """What `get` found. True if there was something, whatever its value; times in seconds.

    `epoch` is what `put` takes: with it, a value computed from here on is refused if anything it rests on was
    invalidated meanwhile. `tier`, `age` and `ttl` are None where nothing was found.
    """

    hit: bool
    value: Any
    epoch: str | None
    tier: str | None = None
    age: float | None = None
    ttl: float | None = None
    stale: bool = False
    degraded: bool = False
    key: str | None = None

    def __bool__(self) -> bool:
        return self.hit


@dataclass(frozen=True, slots=True)
class Info:
    """What is known of a stored value, save the value; times in seconds, `size` in bytes as stored.

    `tags`, `size` and `compute_time` are of the entry in Redis; None when it lies in a lower tier only.
    """

    key: str
    partition: int
    tier: str
    age: float
    ttl: float
    stale: bool
    model: str
    provider: str | None
    epoch: str
    tags: tuple[str, ...] | None
    size: int | None
    compute_time: float | None


class Store(Connection):
    """Values of any profile, by what they were computed from."""

    async def get(
        self,
        profile: str,
        args: Any,
        *,
        tags: Sequence[str] = (),
        tenant: str | None = None,
        scope: Mapping[str, str] | None = None,
        max_age: float | None = None,
        timeout: float | None = None,
    ) -> Found:
        """Look a value up in every tier. `args`, a text or a list or an object, is what it was computed from.

            found = await pond.get("retrieval", {"query": query, "top_n": 5})
            if not found:
                await pond.put("retrieval", {"query": query, "top_n": 5}, await search(query), epoch=found.epoch)

        Raises:
            InvalidRequest: a field is wrong; `.field` names it.
            DeadlineExceeded: no outcome within `timeout` seconds.
            Unavailable: no server could be reached.
        """
        reply = await self._look_up(profile, args, timeout, tags=tags, tenant=tenant, scope=scope, max_age=max_age)
        if isinstance(reply, NotCached):
            return Found(hit=False, value=None, epoch=reply.epoch)
        return Found(
            hit=True,
            value=reply.value,
            epoch=reply.epoch,
            tier=reply.tier,
            age=reply.age,
            ttl=reply.ttl,
            stale=reply.stale,
            degraded=reply.degraded,
            key=reply.key,
        )

    async def exists(
        self,
        profile: str,
        args: Any,
        *,
        tenant: str | None = None,
        scope: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> bool:
        """Say whether `get` would find something. Errors as there."""
        return isinstance(await self._look_up(profile, args, timeout, tenant=tenant, scope=scope), Reply)

    async def info(
        self,
        profile: str,
        args: Any,
        *,
        tenant: str | None = None,
        scope: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Info | None:
        """Return what is known of a stored value; None when there is none. Errors as `get`."""
        reply = await self._look_up(profile, args, timeout, tenant=tenant, scope=scope)
        if isinstance(reply, NotCached):
            return None
        names, (head, size) = await self._at(
            reply.key, lambda k: [("GETRANGE", k.entry(reply.key), 0, _HEAD), ("STRLEN", k.entry(reply.key))]
        )
        tags, compute_time = _told(head, reply.epoch)
        return Info(
            key=reply.key,
            partition=names.partition,
            tier=reply.tier,
            age=reply.age,
            ttl=reply.ttl,
            stale=reply.stale,
            model=reply.model,
            provider=reply.provider,
            epoch=reply.epoch,
            tags=tags,
            size=size if tags is not None else None,
            compute_time=compute_time,
        )

    async def put(
        self,
        profile: str,
        args: Any,
        value: Any,
        *,
        tags: Sequence[str] = (),
        ttl: float | None = None,
        tenant: str | None = None,
        scope: Mapping[str, str] | None = None,
        epoch: str | None = None,
    ) -> str:
        """Store a value; return its key. Any JSON, bytes, or a NumPy array of numbers.

        Give the `epoch` of the `get` that came before the value was computed: without one the value is taken to be
        newer than every invalidation so far. `ttl` in seconds; without one it is the profile's.

        Raises:
            InvalidRequest: a field is wrong, or the value is of no kind that can be stored.
            Superseded: what the value rests on was invalidated after `epoch`, or a newer one is there.
            Unavailable: no server could be reached; the value may or may not be stored.
        """
        if epoch is not None and not _is_id(epoch):
            raise InvalidRequest("epoch must be what `get` returned, such as 1700000000000-0", field="epoch")
        encoded = encode(value)
        question = self._question(profile, args, tags=tags, ttl=ttl, tenant=tenant, scope=scope)
        if question.stores:  # not where the cache is switched off
            _, (outcome,) = await self._at(question.key, lambda k: [self._put_command(k, question, encoded, epoch)])
            if outcome != b"stored":
                why = "what it rests on was invalidated" if outcome == b"invalidated" else "a newer one is there"
                raise Superseded(f"the value was not stored: {why}; compute it again")
        return question.key

    async def delete(
        self, profile: str, args: Any, *, tenant: str | None = None, scope: Mapping[str, str] | None = None
    ) -> None:
        """Forget one value: no request published after this returns is answered with it, from any tier.

        Raises:
            InvalidRequest: a field is wrong; `.field` names it.
            Unavailable: no server could be reached; call again (twice does no harm).
        """
        question = self._question(profile, args, tenant=tenant, scope=scope)
        what: list[Arg] = [self._id, self._settings.invalidation_limit, f"key:{question.key}"]
        await self._at(question.key, lambda k: [SCRIPTS["invalidate"].call([k.invalidations, k.tags], what)])
        if self._fallback is not None:
            self._fallback.invalidated()

    # what they share

    def _body(self, args: Any) -> bytes:
        return self._encode({"model": APPLICATION, "input": args}, "args")

    def _question(self, profile: str, args: Any, **directives: Any) -> Question:
        """Understand a request as the workers would."""
        cache = self._encode_directives({"profile": profile} | directives)
        return understand(self._body(args), cache, self._rules)

    async def _look_up(self, profile: str, args: Any, timeout: float | None, **directives: Any) -> Reply | NotCached:
        directives |= {"profile": profile, "mode": "only-if-cached"}
        try:
            reply = await self._request(self._body(args), directives, timeout)
        except NotCached as miss:
            return miss
        assert isinstance(reply, Reply)  # noqa: S101 (nothing else answers such a request)
        return reply

    def _put_command(self, k: PartitionKeys, question: Question, value: Encoded, epoch: str | None) -> Command:
        settings = self._settings
        return SCRIPTS["put"].call(
            [k.entry(question.key), k.tags, k.landed, k.invalidations],
            [
                question.key, epoch or "", "\n".join(question.tags), question.ttl_ms, question.stale_ms,
                question.error_ms, question.probation_ms, value.meta(question.model, 0), value.data,
                settings.invalidation_limit, settings.landed_limit,
            ],
        )  # fmt: skip

    async def _at(
        self, key: str, commands: Callable[[PartitionKeys], Sequence[Command]]
    ) -> tuple[PartitionKeys, list[Any]]:
        """Run commands, which may run twice, on the partition of `key`; return its names and their results.

        Raises:
            Unavailable: they cannot be known to have run.
        """
        problem = ""
        for attempt in range(4):
            try:
                link, _ = await self._connected()
                names = PartitionKeys(partition_of(key, await self._partitions()))
                return names, await link.send(commands(names))
            except LINK_ERRORS as error:
                problem = str(error)
            except RedisError as error:
                raise Unavailable(f"the server refused it: {error}; `millpond doctor` says more") from error
            await asyncio.sleep(0.05 * 2**attempt)
        raise Unavailable(f"the server cannot be reached ({problem}): call again once it answers")


def _is_id(epoch: str) -> bool:
    first, _, second = epoch.partition("-")
    return first.isascii() and first.isdigit() and second.isascii() and second.isdigit()


def _told(head: bytes, epoch: str) -> tuple[tuple[str, ...] | None, float | None]:
    """Return the tags and the seconds of computation of an entry's beginning, if it is the one of `epoch`."""
    try:
        entry = opened(head)
        return (entry.tags, entry.about["compute_ms"] / 1000) if entry.epoch == epoch else (None, None)
    except (Unreadable, KeyError):
        return None, None
