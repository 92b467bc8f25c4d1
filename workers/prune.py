"""Pruning: removing markers that void nothing any more, so that their number is bounded.

A marker may go once nothing older than it can ever be answered again, in any tier and after any restart. For a horizon
*h*, the newest of the markers that are old enough, that is brought about in this order:

1. `#pruned` becomes *h*. From now on whatever began before *h* and is not stored yet is not stored any more, and no
   flight that began before *h* is joined.
2. Every message of `landed` older than step 1 has left it, and is committed: what is in PostgreSQL now is all that can
   come there from before *h*.
3. The partition's floor in PostgreSQL becomes *h*: persistence writes nothing older, however long it was frozen. What
   the markers void is deleted there, then in Redis. Meanwhile an answer may still move from L3 to L2, but only past
   those markers.
4. The markers are removed, and with each the fence rises: whoever asked PostgreSQL before step 3 comes too late.

A crash between any two steps leaves markers that void nothing, or a horizon that refuses some landings: pruning again
goes on from there. Several may prune at once, for each trusts only what it did itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Literal

from asyncpg import Pool
from redis.exceptions import ResponseError

from shared import keys
from shared.faults import fault_point
from shared.keys import PartitionKeys
from shared.link import Link
from shared.scripts import SCRIPTS
from workers.consumer import server_ms
from workers.sweep import Epoch, Tally, epoch_of, markers, sweep_l2, sweep_l3

log = logging.getLogger("millpond.worker")

_PATIENCE = 30.0
_PER_SCRIPT = 200

#: Not merely FOR UPDATE of the row: before there is one, persistence has nothing to lock FOR SHARE. The table's lock
#: waits for every transaction that has looked, and holds up those that are about to.
_RAISE_FLOOR = """
INSERT INTO floors AS f (partition, epoch_ms, epoch_seq) VALUES ($1, $2, $3)
ON CONFLICT (partition) DO UPDATE SET epoch_ms = EXCLUDED.epoch_ms, epoch_seq = EXCLUDED.epoch_seq
WHERE (f.epoch_ms, f.epoch_seq) < (EXCLUDED.epoch_ms, EXCLUDED.epoch_seq)
"""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one pruning came to. `l2` and `l3` count the answers deleted; `l3` is None without a database.

    `state`: `done`; `nothing` was old enough; `waiting` for persistence to write what landed before; `no-database`
    here although somebody persists this partition's answers.
    """

    partition: int
    state: Literal["done", "nothing", "waiting", "no-database"]
    horizon: str | None = None
    markers: int = 0
    l2: int = 0
    l3: int | None = None


async def prune(
    link: Link,
    pool: Pool | None,
    partition_keys: PartitionKeys,
    *,
    older_than: float,
    patience: float = _PATIENCE,
) -> Pruned:
    """Remove one partition's markers older than `older_than` seconds; wait up to `patience` for persistence.

    Raises:
        one of `LINK_ERRORS` or `DATABASE_ERRORS`: nothing is broken; prune again.
    """
    k, partition = partition_keys, partition_keys.partition
    if pool is None and await persisted(link, k):
        return Pruned(partition, "no-database")
    cutoff: Epoch = (server_ms(await link.call(("TIME",))) - int(older_than * 1000), 0)
    old = {label: at for label, at in (await markers(link, k)).items() if epoch_of(at) < cutoff}
    if not old:
        return Pruned(partition, "nothing")
    horizon = max(old.values(), key=epoch_of)

    (began_ms,) = await link.call(SCRIPTS["prune"].call([k.tags], ["begin", horizon]))
    fault_point("prune_after_begin")
    if pool is not None and not await caught_up(link, k, began_ms, patience):
        return Pruned(partition, "waiting", horizon)
    l3 = None
    if pool is not None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE floors IN EXCLUSIVE MODE")
            await connection.execute(_RAISE_FLOOR, partition, *epoch_of(horizon))
        fault_point("prune_after_floor")
        l3 = await sweep_l3(pool, partition, [(label, epoch_of(at)) for label, at in old.items()], Tally(()))
    fault_point("prune_after_l3")
    l2 = await sweep_l2(link, k, Tally(()))
    fault_point("prune_after_l2")
    pairs = list(old.items())
    ends = [
        SCRIPTS["prune"].call([k.tags], ["end", *(part for pair in pairs[at : at + _PER_SCRIPT] for part in pair)])
        for at in range(0, len(pairs), _PER_SCRIPT)
    ]
    removed = sum(await link.send(ends))
    log.info("partition %d: %d markers pruned up to %s; %d and %s answers deleted", partition, removed, horizon, l2, l3)
    return Pruned(partition, "done", horizon, removed, l2, l3)


async def persisted(link: Link, k: PartitionKeys) -> bool:
    """Whether somebody writes, or wrote, this partition's answers to PostgreSQL."""
    (groups,) = await link.post([("XINFO", "GROUPS", k.landed)])
    if isinstance(groups, ResponseError):
        return False
    return any(keys.PERSISTENCE_GROUP.encode() in group for group in groups)


async def caught_up(link: Link, k: PartitionKeys, began_ms: int, patience: float) -> bool:
    """Wait up to `patience` seconds; say whether all that landed up to that moment has been written by persistence."""
    deadline, pause = time.monotonic() + patience, 0.02
    while True:
        first = await link.call(("XRANGE", k.landed, "-", "+", "COUNT", 1))
        # Strictly: a message of the same millisecond may have come before the horizon.
        if not first or epoch_of(first[0][0].decode())[0] > began_ms:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1.0)
