"""What `ask` returns: an answer and how it came about. Parsed only as far as it is looked at."""

from __future__ import annotations

from typing import Any

import orjson

from shared.answers import text_of
from shared.errors import MillpondError, from_wire


class Reply:
    """One answer.

    Attributes below are read from the wire on first use. Times in seconds.
    """

    __slots__ = ("_fields", "_raw", "request_id")

    def __init__(self, raw: bytes, request_id: str) -> None:
        self._raw = raw
        self._fields: dict[str, Any] | None = None
        self.request_id = request_id

    @property
    def _wire(self) -> dict[str, Any]:
        if self._fields is None:
            self._fields = orjson.loads(self._raw)
        return self._fields

    @property
    def body(self) -> dict[str, Any]:
        """The provider's own JSON, unchanged."""
        body: dict[str, Any] = self._wire["body"]
        return body

    @property
    def text(self) -> str:
        """The answer's text; empty for embeddings and tool calls."""
        return text_of(self.body)

    @property
    def tier(self) -> str:
        """Where the answer was found: `l1`, `l2`, or `llm` when it was computed for this request."""
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
        """Seconds for which the answer may still be served; 0 when it is not stored."""
        return float(self._wire["ttl"])

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
        usage = self.body.get("usage")
        return usage if isinstance(usage, dict) else {}

    @property
    def cache_status(self) -> str:
        """The same in the words of RFC 9211, as a Cache-Status header would say it."""
        if self.tier != "llm":
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
