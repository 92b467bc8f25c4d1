"""What the consumers of one worker process share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from shared.counters import Counters
from shared.errors import ConfigError
from shared.settings import Settings


@dataclass(slots=True)
class Crew:
    """The consumers of one worker process, one per partition, and what they share."""

    kind: str
    settings: Settings
    url: str
    partitions: int
    #: a fresh name per process life: nobody inherits a dead namesake's pending entries
    name: str
    counters: Counters = field(default_factory=Counters)
    #: held while one message is handled that may have killed its workers: one at a time in the whole process
    quarantine: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: whether Redis' memory is above its mark, as of the last heartbeat
    pressure: bool = False
    #: why this process no longer belongs to the deployment
    disowned: ConfigError | None = None
