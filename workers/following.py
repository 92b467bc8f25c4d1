"""Following the invalidation log: what keeps a lookup worker's L1 strictly coherent.

The worker reads the log's news in the same pipeline as a batch of requests, and applies them before it looks anything
up: the batch is judged against every invalidation that was acknowledged before any of its requests was published.
"""

from __future__ import annotations

from typing import Any

from shared.keys import PartitionKeys
from shared.link import Command, Link
from shared.scripts import SCRIPTS
from shared.tiers.l1 import L1


class Following:
    """Applies one partition's invalidation log to an L1."""

    def __init__(self, partition_keys: PartitionKeys, l1: L1) -> None:
        self._keys = partition_keys
        self._l1 = l1
        #: the entry of the log up to which L1 is coherent
        self.at = b""

    async def begin(self, link: Link) -> None:
        """Follow the log from its end on; what L1 held then belongs to another place of it."""
        feed = self._keys.invalidations
        (newest,) = await link.send([("XREVRANGE", feed, "+", "-", "COUNT", 1)])
        if newest:
            at = newest[0][0]
        else:  # a log is never empty, so that a follower can tell "nothing new" from "gone"
            at = await link.call(SCRIPTS["invalidate"].call([feed, self._keys.tags], ["genesis", 1000]))
        if at != self.at:
            self._l1.clear()
            self.at = at

    def command(self) -> Command:
        """Return the command whose reply is to be applied."""
        # Inclusive: the entry last seen must come first; if it does not, the log was trimmed past it, or flushed.
        return ("XRANGE", self._keys.invalidations, self.at, "+")

    def apply(self, log: list[Any]) -> None:
        """Drop from L1 what was invalidated; everything, where that cannot be told."""
        gap = not log or log[0][0] != self.at
        if gap:
            self._l1.clear()
        for entry_id, fields in log if gap else log[1:]:
            self.at = entry_id
            said = dict(zip(fields[::2], fields[1::2], strict=True))
            if b"tags" in said:
                self._l1.invalidate(said[b"tags"].decode(errors="replace").split("\n"))
            elif b"count" not in said:  # an inquiry invalidates nothing
                self._l1.clear()  # written by other hands; whatever it meant, nothing stale is served

    def forget(self) -> None:
        """The log is gone with the server's state, and L1 with it."""
        self._l1.clear()
        self.at = b""
