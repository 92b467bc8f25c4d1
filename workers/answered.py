"""Messages that were answered: first their replies go out, then they are acknowledged, in this order only."""

from __future__ import annotations

import logging
import time
from typing import Any

from shared.faults import fault_point
from shared.link import Command
from shared.scripts import SCRIPTS
from workers.consumer import in_order

log = logging.getLogger("millpond.worker")


class Answered:
    """Replies that wait to go out with the next read, and messages that wait to be retired.

    A message is retired only once its reply is known to have been sent. Retiring is put off until `most` messages
    are ready or `patience` seconds have passed: it is no part of anybody's wait.
    """

    def __init__(self, stream: str, group: str, consumer: str, *, most: int, patience: float) -> None:
        self._stream = stream
        self._owner = (group, consumer)
        self._most = most
        self._patience = patience
        self._replies: list[Command] = []
        self._messages: list[bytes] = []
        self._retiring: list[bytes] = []
        self._retire_at = 0.0

    def __contains__(self, message_id: bytes) -> bool:
        return message_id in self._retiring or message_id in self._messages

    def add(self, replies: list[Command], messages: list[bytes]) -> None:
        """Let `replies` go out with the next read; they answer `messages`."""
        self._replies += replies
        self._messages += messages

    def take(self) -> tuple[list[Command], list[bytes]]:
        """Return the replies that are to go out now, and the messages they answer."""
        taken = self._replies, self._messages
        self._replies, self._messages = [], []
        return taken

    def put_back(self, replies: list[Command], messages: list[bytes]) -> None:
        """Whether they went out is not known: they go out again, and told twice is told once."""
        self._replies, self._messages = replies + self._replies, messages + self._messages

    def confirm(self, messages: list[bytes], results: list[Any]) -> None:
        """Let messages be retired whose replies' results say that they were sent (or that nobody listens)."""
        if results:
            fault_point("lookup_after_reply")
        bad = [result for result in results if isinstance(result, Exception) or result < 0]
        if bad:
            # Paused past the lease, or refused by the server: whoever holds the messages next answers them.
            log.warning("%s: replies were not sent (%s)", self._owner[1], bad[0])
        else:
            self.ready(messages)

    def ready(self, messages: list[bytes]) -> None:
        """Let messages be retired."""
        self._retiring += messages

    def due(self, *, now: bool = False) -> tuple[list[Command], int]:
        """Return what retires the messages that are ready, if it is time, and how many these are."""
        moment = time.monotonic()
        if not self._retiring or not (now or len(self._retiring) >= self._most or moment >= self._retire_at):
            return [], 0
        self._retire_at = moment + self._patience
        ids = in_order(self._retiring)
        return [SCRIPTS["retire"].call([self._stream], [*self._owner, *ids])], len(ids)

    def retired(self, count: int) -> None:
        """Forget the first `count`: they were retired."""
        del self._retiring[:count]

    def clear(self) -> None:
        """Forget everything: the server lost its state."""
        self._replies.clear()
        self._messages.clear()
        self._retiring.clear()
