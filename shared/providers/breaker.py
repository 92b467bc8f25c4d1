"""A circuit breaker per provider and model, shared by the whole pool through Redis.

After `breaker_failures` failures in a row a circuit is open: calls are refused at once, so that a chain goes on to its
next provider and nobody waits for one that is down. After `breaker_reset` seconds one call of the whole pool may try;
it alone closes the circuit, or leaves it open for as long again.

One hash per circuit, one script for every step; nothing is kept while all is well. While Redis cannot be asked,
every circuit counts as closed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from shared import keys
from shared.errors import ContentFiltered, ProviderError, ProviderTimeout, ProviderUnreachable
from shared.link import LINK_ERRORS, Command, Link
from shared.scripts import SCRIPTS
from shared.settings import Settings

log = logging.getLogger("millpond.breaker")

#: Seconds after which a call goes ahead without the circuit's word.
_PATIENCE = 1.0
#: Seconds on top of an attempt's time-out, after which a probe counts as abandoned.
_GRACE = 1.0
#: Seconds for which a process goes by having found a circuit closed, without a failure; of how many it remembers that.
_TRUST = 0.25
_REMEMBERED = 1000


class CircuitOpen(ProviderUnreachable):
    """The provider has just failed several times: no call was made. On the wire it is its parent."""

    passes = False  # the next of the chain is asked at once


def is_ill(error: ProviderError) -> bool:
    """Whether an error says that the provider is down: 5xx, no answer, no connection. A 4xx says that it answers."""
    if isinstance(error, ContentFiltered):
        return False
    return isinstance(error, ProviderTimeout | ProviderUnreachable) or (error.status or 0) >= 500


@dataclass(frozen=True, slots=True)
class Turn:
    """Leave to make one call; a probe's end decides about its circuit."""

    call: str
    probe: bool = False


class Breaker:
    """The circuits as one worker process sees them, on a link that is its own."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._link = Link(url, name="millpond-breaker")
        reset_ms, probe_ms = int(settings.breaker_reset * 1000), int((settings.attempt_timeout + _GRACE) * 1000)
        self._limits = settings.breaker_failures, reset_ms, probe_ms
        self._trust = min(_TRUST, settings.breaker_reset / 4)
        self._well_until: dict[str, float] = {}
        self._names = map("{}.{}".format, itertools.repeat(secrets.token_hex(6)), itertools.count())

    async def look(self, circuit: str) -> None:
        """Return if a call might be made now.

        Raises:
            CircuitOpen: it would be refused.
        """
        self._judge(circuit, await self._run("look", circuit, ""))

    async def ask(self, circuit: str) -> Turn:
        """Return the turn in which a call may be made; say how it ended with `tell` or `give_up`.

        Raises:
            CircuitOpen: it may not be made.
        """
        turn = next(self._names)
        if time.monotonic() < self._well_until.get(circuit, 0.0):
            return Turn(turn)
        found = await self._run("ask", circuit, turn)
        self._judge(circuit, found)
        if found == 0:
            if len(self._well_until) >= _REMEMBERED:
                self._well_until.clear()
            self._well_until[circuit] = time.monotonic() + self._trust
        return Turn(turn, probe=found == 1)

    async def tell(self, circuit: str, turn: Turn, error: ProviderError | None) -> None:
        """Tell what a call came to. An error that several calls share (a batch's) counts once."""
        if error is None or not is_ill(error):
            if turn.probe:
                await self._run("well", circuit, turn.call)
            else:  # behind what its caller sends next, for which somebody waits
                asyncio.get_running_loop().call_soon(self._post, "well", circuit, turn.call)
            return
        if not error.counted:
            error.counted = True
            self._well_until.pop(circuit, None)
            await self._run("ill", circuit, turn.call)

    def give_up(self, circuit: str, turn: Turn, *, ill: bool) -> None:
        """Tell, without waiting, that a call was cut: a failure, or (`ill` false) as if it had never been made."""
        if ill:
            self._well_until.pop(circuit, None)
        self._post("ill" if ill else "void", circuit, turn.call)

    async def close(self) -> None:
        """Close the connection. Safe to call twice."""
        await self._link.close()

    def _post(self, verb: str, circuit: str, call: str) -> None:
        self._link.post([self._command(verb, circuit, call)]).add_done_callback(_look_at)

    def _command(self, verb: str, circuit: str, call: str) -> Command:
        return SCRIPTS["circuit"].call([f"{keys.BREAKER_PREFIX}:{circuit}"], [verb, call, *self._limits])

    async def _run(self, verb: str, circuit: str, call: str) -> int:
        try:
            async with asyncio.timeout(_PATIENCE):
                return int(await self._link.call(self._command(verb, circuit, call)))
        except (*LINK_ERRORS, ResponseError) as error:
            log.warning("the circuit of %s was not asked (%r)", circuit, error)
            return 0

    @staticmethod
    def _judge(circuit: str, found: int) -> None:
        if found < 0:
            raise CircuitOpen(
                f"{circuit} has failed repeatedly and is left alone for another {-found / 1000:.1f} s "
                "(MILLPOND_BREAKER_FAILURES, MILLPOND_BREAKER_RESET)",
                provider=circuit,
                retry_after=-found / 1000,
            )


def _look_at(future: asyncio.Future[list[Any]]) -> None:
    if not future.cancelled():
        future.exception()
