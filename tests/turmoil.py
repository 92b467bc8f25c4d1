"""A deployment under use and under attack at once, with everything recorded that its clients and its provider saw."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import RedisError

from producers.client import Client
from shared.console import UNAVAILABLE
from shared.database import DATABASE_ERRORS, connect_pool
from shared.embedded import EmbeddedRedis
from shared.errors import MillpondError, Superseded, Unavailable
from shared.keys import PartitionKeys, partition_of
from shared.link import LINK_ERRORS, Link
from shared.postgres import EmbeddedPostgres
from tests import openai_server, witness
from tests.faults_support import Pond, until
from tests.openai_server import OpenAIServer
from tests.processes import Process, start_worker
from workers.prune import prune

TAGS = ("doc:1", "doc:2", "user:1", "user:2")
QUESTIONS = {f"question {n}": (TAGS[n % 4], TAGS[(n + 1 + n // 4) % 4]) for n in range(8)}
WORKERS = ("lookup", "lookup", "llm", "persistence", "promotion", "invalidation")
OPTIONS: dict[str, Any] = {
    "background_lease": 1.0,
    "l1_entries": 4,
    "marker_age": 0.4,
    "backoff_initial": 0.02,
    "profiles": {"retrieval": {"ttl": 3600.0}},
}
AWAY: tuple[type[BaseException], ...] = (*LINK_ERRORS, *DATABASE_ERRORS)
#: What is in no lower tier yet must not leave L2; else it may, at any moment.
_EVICT = """
if redis.call('XLEN', KEYS[1]) > 0 then return 0 end
return redis.call('UNLINK', unpack(KEYS, 2))
"""


class CountingProvider(OpenAIServer):
    """A provider whose answer is the number of its call."""

    def __init__(self, history: witness.History, chance: random.Random, slowness: float) -> None:
        super().__init__()
        self._history = history
        self._chance = chance
        self._slowness = slowness

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length:")[2].split()[0]))
        call = self._history.compute()
        await asyncio.sleep(self._chance.random() * self._slowness)
        message = {"role": "assistant", "content": str(call.number)}
        body = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        call.ended = self._history.now()
        writer.write(openai_server._rendered(openai_server.Scripted(body=json.dumps(body).encode())))
        await writer.drain()
        return True


@dataclass(slots=True)
class Turmoil:
    """One run. `chance` decides everything that is decided here."""

    pond: Pond
    chance: random.Random
    history: witness.History = field(default_factory=witness.History)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    attacks: list[str] = field(default_factory=list)

    # users

    async def ask(self, client: Client, prompt: str, *extra: str, **how: Any) -> witness.Ask:
        """Ask one question, by its own tags and perhaps more."""
        tags = (*QUESTIONS[prompt], *extra)
        labels = frozenset((*tags, "profile:response", "tenant:default", f"model:{self.pond.settings.model}"))
        key = self.pond.key(prompt)
        one = witness.Ask(key, partition_of(key, self.pond.partitions), labels, self.history.now())
        self.history.asks.append(one)
        try:
            reply = await client.ask(prompt, tags=tags, **how)
        except MillpondError as error:
            one.error = f"{type(error).__name__}: {error}"
        else:
            one.number, one.tier, one.epoch = int(reply.text), reply.tier, reply.epoch
            one.stored = reply.stored or reply.tier in witness.CACHED
        one.returned = self.history.now()
        return one

    async def asking(self, client: Client) -> None:
        """Ask one thing after the other."""
        while not self.done.is_set():
            extra = [self.chance.choice(TAGS)] if self.chance.random() < 0.1 else []
            how: dict[str, Any] = {"mode": "refresh"} if self.chance.random() < 0.05 else {}
            await self.ask(client, self.chance.choice(list(QUESTIONS)), *extra, **how)
            await asyncio.sleep(self.chance.random() * 0.03)

    async def putting(self, client: Client) -> None:
        """Keep values of our own: look, compute when there is none, store."""
        while not self.done.is_set():
            args, tag = {"query": self.chance.randrange(4)}, "doc:1"
            begun = self.history.now()
            try:
                found = await client.get("retrieval", args, tags=[tag])
                if found:
                    labels = frozenset((tag, "profile:retrieval", "tenant:default", "model:application"))
                    key = found.key or ""
                    where = partition_of(key, self.pond.partitions)
                    returned = self.history.now()
                    one = witness.Ask(key, where, labels, begun, returned, found.value, found.tier or "", True)
                    one.epoch = found.epoch or ""
                    self.history.asks.append(one)
                else:
                    made = self.history.compute()
                    await asyncio.sleep(self.chance.random() * 0.1)
                    made.ended = self.history.now()
                    await client.put("retrieval", args, made.number, tags=[tag], epoch=found.epoch)
            except (Superseded, Unavailable):
                pass
            await asyncio.sleep(self.chance.random() * 0.1)

    async def invalidating(self, client: Client, every: float) -> None:
        """Invalidate this and that; whatever was not acknowledged binds nobody."""
        while not self.done.is_set():
            await asyncio.sleep(self.chance.random() * 2 * every)
            what = self._target()
            begun = self.history.now()
            try:
                found = await client.invalidate(**what)
            except Unavailable:
                continue
            labels = frozenset(found.labels)
            self.history.invalidations.append(witness.Invalidation(labels, begun, self.history.now(), dict(found.ids)))

    def _target(self) -> dict[str, Any]:
        kind = self.chance.choices(["tag", "prefix", "key", "everything", "profile"], [12, 2, 3, 1, 1])[0]
        if kind == "tag":
            return {"tags": [self.chance.choice(TAGS)]}
        if kind == "prefix":
            return {"prefix": self.chance.choice(["doc:", "user:1"])}
        if kind == "key":
            return {"key": self.pond.key(self.chance.choice(list(QUESTIONS)))}
        return {"everything": True} if kind == "everything" else {"profile": "response"}

    # what befalls the deployment

    async def evicting(self) -> None:
        """Let L2 forget, so that L3 is asked."""
        while not self.done.is_set():
            await asyncio.sleep(self.chance.random() * 0.4)
            try:
                for k in self.pond.all_names():
                    if names := list(self.pond.redis.scan_iter(k.entry("*"))):
                        self.pond.redis.eval(_EVICT, 1 + len(names), k.landed, *names)
            except RedisError:
                continue

    async def pruning(self, database_url: str) -> None:
        """Prune by hand, beside what the worker does."""
        link, pool = Link(self.pond.url, name="pruning"), await connect_pool(database_url, size=2)
        try:
            while not self.done.is_set():
                await asyncio.sleep(self.chance.random() * 0.5)
                try:
                    k = PartitionKeys(self.chance.randrange(self.pond.partitions))
                    found = await prune(link, pool, k, older_than=self.chance.random() * 0.5, patience=0.5)
                    self.attacks.append(f"prune {found.state}")
                except AWAY:
                    continue
        finally:
            await link.close()
            pool.terminate()

    async def attacking(
        self,
        attacks: Sequence[Callable[[], Awaitable[None]]],
        every: float,
        revive: Callable[[], Awaitable[None]],
    ) -> None:
        """Do harm, one after the other; `revive` before each."""
        while not self.done.is_set():
            await asyncio.sleep(every * (0.5 + self.chance.random()))
            if not self.done.is_set():
                await revive()
                await self.chance.choice(attacks)()


class Fleet:
    """The workers as processes, and their servers; what may be killed comes back."""

    def __init__(self, turmoil: Turmoil, server: EmbeddedRedis, database: EmbeddedPostgres) -> None:
        self.turmoil = turmoil
        self.server = server
        self.database = database
        self.processes: list[tuple[str, Process]] = []

    async def start(self) -> None:
        """Start every worker, and wait until they read."""
        self.processes = [(kind, await self._begin(kind)) for kind in WORKERS]
        for _, process in self.processes:
            await asyncio.to_thread(process.wait_for, "ready")

    async def _begin(self, kind: str) -> Process:
        pond = self.turmoil.pond
        return await asyncio.to_thread(lambda: start_worker(kind, pond.url, ready=False, **pond.options))

    async def kill_worker(self) -> None:
        """SIGKILL one, start another of its kind."""
        at = self.turmoil.chance.randrange(len(self.processes))
        kind, process = self.processes[at]
        self.turmoil.attacks.append(f"kill {kind}")
        await asyncio.to_thread(process.sigkill)
        process.close()
        self.processes[at] = kind, await self._begin(kind)

    async def freeze_worker(self) -> None:
        """SIGSTOP one for longer than its lease."""
        kind, process = self.turmoil.chance.choice(self.processes)
        self.turmoil.attacks.append(f"freeze {kind}")
        with contextlib.suppress(FileNotFoundError):  # it has just ended: there was no Redis at its start
            await asyncio.to_thread(process.sigstop)
            await asyncio.sleep(1.3)  # every lease is a second: another takes over what it holds
            process.sigcont()

    async def restart_redis(self) -> None:
        """Kill Redis, start it again."""
        self.turmoil.attacks.append("restart redis")
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.restart)

    async def restart_database(self) -> None:
        """Stop or kill PostgreSQL, start it again."""
        self.turmoil.attacks.append("restart postgres")
        if self.turmoil.chance.random() < 0.5:
            await asyncio.to_thread(self.database.kill)
        await asyncio.to_thread(self.database.restart)

    async def revive(self) -> None:
        """Start those again that found no Redis at their start, as the supervisor does; fail if another has ended."""
        for at, (kind, process) in enumerate(self.processes):
            if not process.running:
                assert process.wait() == UNAVAILABLE, f"a {kind} worker ended: {process.report()}"
                process.close()
                self.processes[at] = kind, await self._begin(kind)

    def close(self) -> None:
        """End them all."""
        for _, process in self.processes:
            process.close()


@asynccontextmanager
async def users(turmoil: Turmoil, *, askers: int, every: float) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Run everything that uses the deployment; at the end wait until each has its last answer."""
    async with turmoil.pond.client() as client, turmoil.pond.client() as other:
        work = [turmoil.asking(client if n % 2 else other) for n in range(askers)]
        tasks = [asyncio.create_task(one) for one in (*work, turmoil.putting(client), turmoil.evicting())]
        tasks.append(asyncio.create_task(turmoil.invalidating(other, every)))
        try:
            yield tasks
        finally:
            turmoil.done.set()
            await asyncio.gather(*tasks)


async def for_seconds(seconds: float, *tasks: asyncio.Task[None]) -> None:
    """Let them run for so long; fail at once with whatever one of them raises."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.05)


async def written(pond: Pond) -> None:
    """Wait until everything that landed is in PostgreSQL."""
    await until(lambda: not pond.length("landed"), "what landed is persisted", timeout=30.0)
