"""What a worker process does around its consumers.

It settles the deployment, starts one consumer per partition, tells that it is alive, adds up its counters and stops
in order.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import orjson
from redis.exceptions import ResponseError

from shared import keys
from shared.counters import Counters
from shared.deployment import settle
from shared.embedded import resolve_url
from shared.errors import ConfigError
from shared.keys import PartitionKeys
from shared.link import LINK_ERRORS, Link
from shared.settings import Settings
from workers.consumer import Consumer
from workers.crew import Crew

log = logging.getLogger("millpond.worker")

_BEAT = 1.0
_BEAT_TTL_MS = 5000


async def run_crew(
    kind: str,
    settings: Settings,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
    consumer: Callable[[Crew, PartitionKeys], Consumer],
) -> None:
    """Run one consumer per partition until `stop` is set; then finish or hand back what is in hand.

    Raises:
        ConfigError: the deployment was born otherwise than this process is configured.
        Unavailable: no server answers.
    """
    async with _enlisted(kind, settings) as (crew, link):
        consumers = [consumer(crew, PartitionKeys(p)) for p in range(crew.partitions)]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(c.run()) for c in consumers]
            beat = tasks.create_task(_beat(crew, link, stop))
            ready = tasks.create_task(_all_ready(consumers, lambda: on_ready(crew.name)))
            await stop.wait()
            ready.cancel()
            await asyncio.gather(*(c.stop() for c in consumers))
            await asyncio.gather(*running)
            beat.cancel()


async def run_alone(
    kind: str,
    settings: Settings,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
    work: Callable[[Crew, asyncio.Event, Callable[[], None]], Awaitable[None]],
) -> None:
    """Run `work(crew, stop, ready)`, which consumes no streams, as one worker: settled, with a heartbeat and counters.

    Raises:
        ConfigError: the deployment was born otherwise than this process is configured.
        Unavailable: no server answers.
    """
    async with _enlisted(kind, settings) as (crew, link):
        beat = asyncio.create_task(_beat(crew, link, stop))
        try:
            await work(crew, stop, lambda: on_ready(crew.name))
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)


@asynccontextmanager
async def _enlisted(kind: str, settings: Settings) -> AsyncIterator[tuple[Crew, Link]]:
    """Yield a crew of a settled deployment and the link of its heartbeat; take leave of Redis at an orderly end."""
    url = resolve_url(settings)
    link = Link(url, name=f"millpond-{kind}-beat")
    try:
        partitions = await settle(link, settings.partitions)
        crew = Crew(kind, settings, url, partitions, f"{kind}-{secrets.token_hex(6)}")
        yield crew, link
        await _flush(crew, link, farewell=True)
        if crew.disowned is not None:
            raise crew.disowned
    finally:
        await link.close()


async def _all_ready(consumers: list[Consumer], then: Callable[[], None]) -> None:
    for consumer in consumers:
        await consumer.ready.wait()
    then()


async def _beat(crew: Crew, link: Link, stop: asyncio.Event) -> None:
    while True:
        try:
            await _flush(crew, link)
            # A flushed server forgets its birth; the workers that live on remember it.
            await settle(link, crew.partitions)
        except ConfigError as error:
            # It was born anew, otherwise: what this worker reads is no longer the deployment's.
            crew.disowned = error
            stop.set()
            return
        except (*LINK_ERRORS, ResponseError) as error:
            log.debug("no heartbeat: %s", error)
        await asyncio.sleep(_BEAT)


async def _flush(crew: Crew, link: Link, *, farewell: bool = False) -> None:
    taken = crew.counters.take()
    about = {
        "kind": crew.kind,
        "name": crew.name,
        "pid": os.getpid(),
        "host": platform.node(),
        "partitions": crew.partitions,
        "provider": crew.settings.provider_recorded if crew.kind == "llm" else None,
        "cache_enabled": crew.settings.cache_enabled,
        "seen": time.time(),
    }
    name = keys.worker(crew.name)
    beat: Sequence[str | bytes | int] = (
        ("DEL", name) if farewell else ("SET", name, orjson.dumps(about), "PX", _BEAT_TTL_MS)
    )
    try:
        *_, pressure = await link.send([tuple(beat), *Counters.commands(taken), ("EXISTS", keys.PRESSURE)])
        crew.pressure = bool(pressure)
    except (*LINK_ERRORS, ResponseError):
        crew.counters.put_back(taken)
        if not farewell:
            raise
    else:
        if crew.settings.heartbeat_file is not None:
            crew.settings.heartbeat_file.touch()
