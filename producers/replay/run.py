"""Driving a client through a workload: open loop at given times, or closed loop as fast as answers come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any, Protocol

from producers.replay.record import Answer, Recorder
from producers.replay.workload import Request
from shared.errors import MillpondError

CLOSED_LOOP = 100
OPEN_LOOP = 20_000


class Asker(Protocol):
    """The part of a client that a run uses."""

    async def ask_body(
        self,
        body: dict[str, Any] | bytes,
        *,
        profile: str | None = None,
        tenant: str | None = None,
        timeout: float | None = None,
    ) -> Answer:
        """Put an OpenAI-style body and return the answer, or raise a `MillpondError`."""


class Run:
    """One replay of `requests` through `client`.

    With a `schedule` (seconds from the start, one per request) it is an open loop: a request is sent when it is due
    whether or not earlier ones were answered, and its latency counts from when it was due, so a stall of the system
    or of this process shows up in the figures. Without one, `concurrency` requests are on their way at any moment.
    `profile`, `tenant` and `timeout` (seconds) apply where a request names none. The attribute `concurrency` is the
    limit in force, given or not.
    """

    def __init__(
        self,
        client: Asker,
        requests: Sequence[Request],
        schedule: Sequence[float] | None = None,
        *,
        concurrency: int | None = None,
        profile: str | None = None,
        tenant: str | None = None,
        timeout: float | None = None,
    ) -> None:
        self.recorder = Recorder()
        self.interrupted = False
        self.concurrency = concurrency or (CLOSED_LOOP if schedule is None else OPEN_LOOP)
        self._client = client
        self._requests = requests
        self._schedule = schedule
        self._profile = profile
        self._tenant = tenant
        self._timeout = timeout
        self._began = 0.0

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent at times of their own."""
        return self._schedule is not None

    async def complete(self) -> Recorder:
        """Send everything and return the record; when cancelled, return the record of what was done by then."""
        self._began = monotonic()
        work = self._open() if self._schedule is not None else self._closed()
        try:
            await work
        except asyncio.CancelledError:
            self.interrupted = True
        self.recorder.wall = monotonic() - self._began
        return self.recorder

    async def _closed(self) -> None:
        left = iter(self._requests)

        async def one_after_another() -> None:
            for request in left:
                now = monotonic()
                self.recorder.lag.append(0.0)
                await self._ask(request, now)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self.concurrency, len(self._requests))):
                group.create_task(one_after_another())

    async def _open(self) -> None:
        schedule = self._schedule or ()
        order = sorted(range(len(self._requests)), key=schedule.__getitem__)
        free = asyncio.Semaphore(self.concurrency)
        async with asyncio.TaskGroup() as group:
            for number in order:
                due = self._began + schedule[number]
                if (wait := due - monotonic()) > 0:
                    await asyncio.sleep(wait)
                await free.acquire()
                now = monotonic()
                self.recorder.lag.append(max(0.0, now - due))
                # A timer may fire a millisecond early: what is sent early counts from its sending.
                task = group.create_task(self._ask(self._requests[number], min(due, now)))
                task.add_done_callback(lambda _: free.release())

    async def _ask(self, request: Request, due: float) -> None:
        try:
            reply = await self._client.ask_body(
                request.body,
                profile=request.profile or self._profile,
                tenant=request.tenant or self._tenant,
                timeout=self._timeout,
            )
        except MillpondError as error:
            self.recorder.failed(due - self._began, monotonic() - due, error.code, error.message)
        else:
            self.recorder.answered(due - self._began, monotonic() - due, reply)
