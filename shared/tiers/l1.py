"""L1: the entries a lookup worker holds in process, for one partition.

Strictly coherent because its holder applies the invalidation log, read in the same pipeline as every batch of
requests, before it looks anything up. Bounded by entries and bytes, least recently used first out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from shared.entry import Entry


class L1:
    """A bounded map of cache keys to entries with an index by tag."""

    def __init__(self, *, entries: int, size: int) -> None:
        self._most = entries
        self._most_bytes = size
        self._bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._tagged: dict[str, set[str]] = {}
        #: rises with every invalidation applied; see `put`
        self.clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._bytes

    def get(self, key: str, now_ms: int) -> Entry | None:
        """Return the entry of `key` unless it has expired."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_ms <= now_ms:
            self.drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, entry: Entry, *, clock: int) -> bool:
        """Hold `entry`, which was read when `self.clock` stood at `clock`; say whether it was taken.

        An invalidation applied since then may concern an entry that was not here to be dropped: it is refused.
        """
        if clock != self.clock:
            return False
        self.drop(entry.key)  # even if its successor does not fit
        if entry.size > self._most_bytes or not self._most:
            return False
        self._entries[entry.key] = entry
        self._bytes += entry.size
        for tag in entry.tags:
            self._tagged.setdefault(tag, set()).add(entry.key)
        while len(self._entries) > self._most or self._bytes > self._most_bytes:
            self.drop(next(iter(self._entries)))
        return True

    def drop(self, key: str) -> None:
        """Forget one key, if held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._bytes -= entry.size
        for tag in entry.tags:
            keys = self._tagged[tag]
            keys.discard(key)
            if not keys:
                del self._tagged[tag]

    def invalidate(self, tags: Iterable[str]) -> None:
        """Apply one invalidation of the log."""
        self.clock += 1
        for tag in tags:
            if tag == "all":
                self.clear()
            elif tag.startswith("key:"):
                self.drop(tag[4:])
            elif tag.startswith("prefix:"):
                for held in [held for held in self._tagged if held.startswith(tag[7:])]:
                    self._drop_tagged(held)
            else:
                self._drop_tagged(tag)

    def _drop_tagged(self, tag: str) -> None:
        for key in list(self._tagged.get(tag, ())):
            self.drop(key)

    def clear(self) -> None:
        """Forget everything: the feed had a gap, or the server lost its state."""
        self.clock += 1
        self._entries.clear()
        self._tagged.clear()
        self._bytes = 0
