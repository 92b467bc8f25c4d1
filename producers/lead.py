"""Computing for all who ask: the application elected for a key runs its function, stores the value, tells the others.

The flight's lease is renewed while the function runs; whatever is written is fenced by the flight's token, so that one
who was frozen past its lease writes nothing. Who raises tells the others its error, or lets the next of them compute;
who is cancelled always lets the next.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from shared.errors import ComputeError
from shared.faults import fault_point
from shared.keys import PartitionKeys
from shared.link import LINK_ERRORS, Command, Link
from shared.outbox import Outbox, error_payload
from shared.scripts import SCRIPTS, Arg
from shared.settings import Settings
from shared.values import APPLICATION, Encoded, encode, read_entry

log = logging.getLogger("millpond.client")

#: Seconds for which a caller whose value is there waits for it to be stored.
_PATIENCE = 2.0
_LONGEST_MESSAGE = 500


class Alone:
    """Redis cannot be reached: compute for yourself."""


ALONE: Final = Alone()
_ASK_AGAIN = b'{"again":true}'


@dataclass(frozen=True, slots=True)
class Grant:
    """The task to compute a key's value for all who ask. `lease` in seconds."""

    token: str
    epoch: str
    key: str
    partition: int
    lease: float
    ttl_ms: int
    stale_ms: int
    error_ms: int
    probation_ms: int
    tags: Sequence[str]
    model: str

    @classmethod
    def read(cls, payload: bytes) -> Grant:
        """Read the payload that elects."""
        said = orjson.loads(payload)["lead"]
        return cls(**{name: said[name] for name in cls.__slots__})


async def run(function: Callable[[], Any]) -> Any:
    """Return the result of an application's function: awaited, or of a plain one run in a thread of its own.

    A thread of its own, not one of a pool: a function may itself wait for another key's.
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        return await function()
    result = await _in_thread(function)
    return await result if inspect.isawaitable(result) else result


async def _in_thread(function: Callable[[], Any]) -> Any:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration) or not isinstance(error, Exception):
            # No future takes the one, and the others (SystemExit) would end the loop, and with it everybody's requests.
            future.set_exception(RuntimeError(f"the function raised {error!r}"))
        else:
            future.set_exception(error)

    def work(context: contextvars.Context) -> None:
        result, error = None, None
        try:
            result = context.run(function)
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, args=(contextvars.copy_context(),), name="millpond-compute", daemon=True).start()
    return await future


class Leader:
    """One election of this client: the flight it holds, until it lands, fails or is lost."""

    def __init__(self, link: Link, grant: Grant, settings: Settings) -> None:
        self._link = link
        self._grant = grant
        self._settings = settings
        self._names = PartitionKeys(grant.partition)
        self._over = False
        #: how long what the flight came to is remembered: as long as a cut connection may have it said again
        self._outcome_ms = int(grant.lease * 2000)
        #: by the server's clock; 0 until a renewal has told it
        self._lease_end_ms = 0
        self._heart = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        grant, names = self._grant, self._names
        lease_ms = int(grant.lease * 1000)
        while True:
            args: list[Arg] = [grant.token, lease_ms, self._lease_end_ms]
            try:
                now_ms = await self._link.call(SCRIPTS["lead_renew"].call([names.flight(grant.key)], args))
                if not now_ms:
                    log.warning("the computation of %s was out of reach for a lease; another computes it", grant.key)
                    return
                self._lease_end_ms = now_ms + lease_ms
            except LINK_ERRORS as error:
                log.debug("a lease is not renewed (%s); trying again", error)
            await asyncio.sleep(grant.lease / 4)

    async def land(self, value: Encoded, compute_ms: int) -> None:
        """Store the value and tell all who wait; nothing if the flight was lost, or handed on."""
        grant, names, settings = self._grant, self._names, self._settings
        flight = [
            names.entry(grant.key), names.flight(grant.key), names.waiters(grant.key, grant.token),
            names.outcome(grant.key, grant.token), names.tags, names.landed, names.invalidations,
        ]  # fmt: skip
        args: list[Any] = [
            grant.key, grant.token, grant.epoch, grant.ttl_ms, grant.stale_ms, grant.error_ms, grant.probation_ms,
            value.meta(grant.model, compute_ms), value.data, settings.invalidation_limit, settings.landed_limit,
            self._outcome_ms, "\n".join(grant.tags), self._lease_end_ms,
        ]  # fmt: skip
        reply = await self._settle(SCRIPTS["lead_land"].call(flight, args))
        if reply[0] == b"LOST":
            return
        fault_point("lead_after_land")
        stored, now_ms, waiters, fresh_ms = reply
        members: dict[str, Any] = {"tier": "app", "collapsed": False, "stored": stored.decode(), "age": 0.0}
        members |= {"ttl": (fresh_ms - now_ms) / 1000 if stored == b"stored" else 0.0, "key": grant.key}
        members |= {"model": grant.model, "provider": APPLICATION, "epoch": grant.epoch}
        await self._tell(now_ms, waiters, value.payload(members), value.payload(members | {"collapsed": True}))

    async def fail(self, error: ComputeError | None) -> Encoded | None:
        """End the flight without a value: all who wait get the error, or (None) ask again, and one of them computes.

        Instead of an error they get an entry that the profile keeps for that case, save those who take no stored
        answer; returned, if there is one. Handed on, the flight is over: what is said of it later writes nothing.
        """
        grant, names = self._grant, self._names
        flight = [
            names.flight(grant.key), names.waiters(grant.key, grant.token), names.outcome(grant.key, grant.token),
            names.entry(grant.key), names.tags,
        ]  # fmt: skip
        args: list[Arg] = [grant.token, self._outcome_ms, self._lease_end_ms, grant.key, int(error is not None)]
        reply = await self._settle(SCRIPTS["lead_fail"].call(flight, args))
        if reply[0] == b"LOST":
            return None
        _, now_ms, waiters, kept = reply
        payload = _ASK_AGAIN if error is None else error_payload(error)
        if kept and (found := read_entry(kept, now_ms)) is not None:
            members = {"tier": "l2", "collapsed": False, "stored": "stored", "degraded": True, "key": grant.key}
            first, rest = (found[1].payload(members | found[0] | {"collapsed": late}) for late in (False, True))
            await self._tell(now_ms, waiters, first, rest, strict=payload)
            return found[1]
        await self._tell(now_ms, waiters, payload, payload)
        return None

    async def _settle(self, command: Command) -> list[Any]:
        """Send until it is known to have run; it says the same when it runs again. Given up after a lease."""
        if self._over:
            return [b"LOST"]
        self._over = True
        until, pause = time.monotonic() + self._grant.lease, 0.02
        try:
            while time.monotonic() < until:
                try:
                    return list(await self._link.call(command))
                except LINK_ERRORS:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.5)
            return [b"LOST"]
        finally:
            self._heart.cancel()

    async def _tell(
        self, now_ms: int, waiters: list[bytes], first: bytes, rest: bytes, *, strict: bytes | None = None
    ) -> None:
        """Answer everyone aboard, in time or not at all; then forget them. Who is not told knocks, and is answered.

        Those who take no stored answer get `strict`, if it is given.
        """
        not_after_ms = now_ms + int(self._grant.lease * 800)
        outbox = Outbox(self._settings.reply_limit)
        outbox.add_waiters(waiters, first, rest, strict)
        flight = self._grant.key, self._grant.token
        forget = ("DEL", self._names.waiters(*flight), self._names.outcome(*flight))
        try:
            if -1 in await self._link.send(outbox.take(not_after_ms)):
                return
            await self._link.call(forget)
        except LINK_ERRORS as error:
            log.debug("those who wait are not told (%s); they ask again", error)


async def compute(
    leader: Leader,
    function: Callable[[], Any],
    *,
    elect: bool,
    strict: bool,
    finish: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
) -> Any:
    """Run `function` for all who wait; return its value.

    `elect`: if it raises, the next of them computes; `strict`: no stored value stands in here. What is to be
    written goes on in the background (`finish` makes it a task) when the server is slow to take it.

    Raises:
        Exception: whatever `function` raised, unless an entry kept for that case stands in.
        InvalidRequest: its value cannot be stored.
    """
    began = time.monotonic()
    try:
        value = encode(await run(function))
    except Exception as error:
        told = None if elect else ComputeError(_said(error), kind=type(error).__name__)
        failing = finish(leader.fail(told))
        await asyncio.wait({failing}, timeout=_PATIENCE)
        kept = failing.result() if failing.done() and not failing.cancelled() else None
        if kept is None or strict:
            raise
        log.warning("a computation failed; a stored value past its time stands in", exc_info=error)
        return kept.decoded()
    except BaseException:  # cancelled, interrupted: no fault of the computation
        finish(leader.fail(None))
        raise
    fault_point("lead_after_compute")
    landing = finish(leader.land(value, int((time.monotonic() - began) * 1000)))
    await asyncio.wait({landing}, timeout=_PATIENCE)
    return value.decoded()


def _said(error: Exception) -> str:
    return f"whoever computed this raised {type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
