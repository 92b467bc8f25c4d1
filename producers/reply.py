"""What `ask` returns: an answer and how it came about. Parsed only as far as it is looked at."""

from __future__ import annotations

from typing import Any

import orjson

from shared.answers import text_of
from shared.errors import MillpondError, from_wire
from shared.values import decode, split


class Reply:
    """One answer.

    Attributes below are read from the wire on first use. Times in seconds.
    """

    __slots__ = ("_data", "_fields", "_raw", "request_id")

    def __init__(self, raw: bytes, request_id: str) -> None:
        self._raw = raw
        self._fields: dict[str, Any] | None = None
        self._data: bytes | None = None
        self.request_id = request_id

    @property
    def _wire(self) -> dict[str, Any]:
        if self._fields is None:
            text, self._data = split(self._raw)
            self._fields = orjson.loads(text)
        return self._fields

    @property
    def size(self) -> int:
        """Bytes of the payload, with what it weighs in memory."""
        return len(self._raw) + 400

    def retold(self, request_id: str, changes: dict[str, Any]) -> Reply:
        """Return this answer as another request is told it; its body is parsed anew, nobody shares it."""
        reply = Reply(self._raw, request_id)
        reply._fields = reply._wire | changes
        return reply

    @property
    def body(self) -> dict[str, Any]:
        """The provider's own JSON, unchanged; of bytes and arrays what describes them, see `value`."""
        body: dict[str, Any] = self._wire["body"]
        return body

    @property
    def value(self) -> Any:
        """The answer as a value: JSON as it is, or bytes, or a NumPy array (a copy of its own at each look)."""
        body = self._wire["body"]
        return body if self._data is None else decode(body, self._data)

    @property
    def text(self) -> str:
        """The answer's text; empty for embeddings, tool calls and values that are no provider's answer."""
        body = self._wire["body"]
        return text_of(body) if self._data is None and isinstance(body, dict) else ""

    @property
    def tier(self) -> str:
        """Where it was found: `l1`, `l2`, `semantic`, `l3`; or who computed it for this request: `llm`, `app`."""
        return str(self._wire["tier"])

    @property
    def collapsed(self) -> bool:
        """Whether this request joined a computation that another request had begun."""
        return bool(self._wire["collapsed"])

    @property
    def stored(self) -> bool:
        """Whether the answer is in the cache now."""
        return bool(self._wire["stored"] == "stored")

    @property
    def detail(self) -> str:
        """`stored`, or the reason why the answer was not: `no-store`, `invalidated`, `overtaken`, `length`, `empty`."""
        return str(self._wire["stored"])

    @property
    def age(self) -> float:
        """Seconds since the answer was stored."""
        return float(self._wire["age"])

    @property
    def ttl(self) -> float:
        """Seconds for which the answer is still fresh; 0 when it is stale, or not stored."""
        return float(self._wire["ttl"])

    @property
    def stale(self) -> bool:
        """Whether the answer is past its time and served while it is refreshed, or for want of a better one."""
        return bool(self._wire.get("stale", False))

    @property
    def degraded(self) -> bool:
        """Whether something was down and this answer is what could be had meanwhile."""
        return bool(self._wire.get("degraded", False))

    @property
    def provider(self) -> str | None:
        """Who computed the answer: a provider's name, or `application`; None where it is not known."""
        provider = self._wire.get("provider")
        return None if provider is None else str(provider)

    @property
    def epoch(self) -> str:
        """The newest invalidation the answer's computation had seen when it began, as `Client.put` takes it."""
        return str(self._wire.get("epoch", "0-0"))

    @property
    def key(self) -> str:
        """The cache key: 32 hexadecimal digits."""
        return str(self._wire["key"])

    @property
    def model(self) -> str:
        """The model asked."""
        return str(self._wire["model"])

    @property
    def usage(self) -> dict[str, Any]:
        """The provider's own usage object; what a cached or collapsed answer shows here was not spent again."""
        body = self._wire["body"]
        usage = body.get("usage") if isinstance(body, dict) else None
        return usage if isinstance(usage, dict) else {}

    @property
    def cache_status(self) -> str:
        """The same in the words of RFC 9211, as a Cache-Status header would say it."""
        if self.tier not in ("llm", "app"):
            return f"millpond; hit; ttl={int(self.ttl)}; detail={self.tier}"
        collapsed = "; collapsed" if self.collapsed else ""
        stored = "; stored" if self.stored else ""
        detail = "" if self.stored else f"; detail={self.detail}"
        return f"millpond; fwd=miss{collapsed}{stored}{detail}"

    def __repr__(self) -> str:
        return f"Reply({self.text[:60]!r}, tier={self.tier!r}, collapsed={self.collapsed})"


def error_of(raw: bytes) -> MillpondError:
    """Return the error that an error payload carries."""
    return from_wire(orjson.loads(raw)["error"])
