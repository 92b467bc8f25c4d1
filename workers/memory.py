"""The memory watch: tells the deployment when Redis is nearly full.

`mp:pressure` stands while it is. LLM workers then compute no refreshes and give what lands a tenth of its probation;
nothing is refused.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import orjson

from shared import keys
from shared.counters import Counters
from shared.link import Link
from shared.settings import Settings

log = logging.getLogger("millpond.schedule")

#: Longer than two looks: one that is late does not end the relief.
PRESSURE_MS = 15_000
#: Relief ends this far below the mark, so that it does not come and go.
_RELIEVED = 0.95


async def watch(link: Link, settings: Settings) -> dict[str, Any]:
    """Compare Redis' memory with its mark; set, renew or remove `mp:pressure`.

    Returns `used` and `limit` (bytes; limit None: unbounded, nothing to compare with), `share` and `pressure`.
    """
    memory = _fields(await link.call(("INFO", "memory")))
    # What maxmemory is compared with: buffers of replicas and of the append-only file do not count.
    used = int(memory["used_memory"]) - int(memory.get("mem_not_counted_for_evict", 0))
    limit = int(memory.get("maxmemory", 0)) or settings.memory_limit
    if not limit:
        return {"used": used, "limit": None, "share": None, "pressure": False}
    share = used / limit
    seen: dict[str, Any] = {"used": used, "limit": limit, "share": round(share, 4)}
    if share >= settings.memory_mark:
        await _alert(link, seen)
    elif share < settings.memory_mark * _RELIEVED:
        if await link.call(("DEL", keys.PRESSURE)):
            log.warning("Redis' memory is below its mark again: %.0f %% of %d bytes", share * 100, limit)
        return seen | {"pressure": False}
    return seen | {"pressure": bool(await link.call(("EXISTS", keys.PRESSURE)))}


async def _alert(link: Link, seen: dict[str, Any]) -> None:
    # Renewed by PEXPIRE: a server that has no byte left still takes that.
    if await link.call(("PEXPIRE", keys.PRESSURE, PRESSURE_MS)):
        return
    text = orjson.dumps(seen | {"since": round(time.time(), 3)})
    if await link.call(("SET", keys.PRESSURE, text, "PX", PRESSURE_MS, "NX")):
        log.warning("Redis' memory is above its mark: %.0f %% of %d bytes", seen["share"] * 100, seen["limit"])
        await link.send(Counters.commands({"memory_alerts": 1}))


def _fields(info: bytes) -> dict[str, str]:
    """Read a reply to INFO."""
    return dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
