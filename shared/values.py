"""Values an application caches: any JSON, bytes, NumPy arrays. NumPy is imported only where an array is met.

On the wire and in an entry, JSON is itself; bytes and arrays are raw, described by a small object: `{"kind": "bytes"}`,
or `{"kind": "array", "dtype": "<f4", "shape": [2, 1536]}` (C order). See docs/protocol.md.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

import orjson

from shared.envelope import opened
from shared.errors import InvalidRequest, MillpondError

#: The provider's name of what an application computed, and the model that stands in its key.
APPLICATION = "application"
_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c8|c16)")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value as it is stored: `about` is None when `data` is JSON, else it describes the bytes."""

    data: bytes
    about: dict[str, Any] | None = None

    def meta(self, model: str, compute_ms: int) -> bytes:
        """Return the meta line of an entry (see shared/entry.py); the light client stores without compression."""
        said: dict[str, Any] = {"model": model, "enc": "raw", "compute_ms": compute_ms, "provider": APPLICATION}
        said |= {"tokens": (0, 0), "cost": None} | ({"value": self.about} if self.about else {})
        return orjson.dumps(said)

    def payload(self, members: dict[str, Any]) -> bytes:
        """Return a reply payload that carries this value behind `members`."""
        if self.about is None:
            return orjson.dumps(members | {"body": orjson.Fragment(self.data)})
        return framed(orjson.dumps(members | {"body": self.about}), self.data)

    def decoded(self) -> Any:
        """Return the value as whoever reads it gets it: tuples as lists, arrays as copies that may be written to."""
        return orjson.loads(self.data) if self.about is None else decode(self.about, self.data)


def encode(value: Any) -> Encoded:
    """Encode a value.

    Raises:
        InvalidRequest: it is neither JSON nor bytes nor an array of numbers.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return Encoded(bytes(value), {"kind": "bytes"})
    numpy = sys.modules.get("numpy")  # who holds an array has imported it
    if numpy is not None and isinstance(value, numpy.ndarray):
        if not _DTYPE.fullmatch(value.dtype.str):
            raise InvalidRequest(f"an array of {value.dtype} cannot be stored: give numbers or booleans", field="value")
        return Encoded(value.tobytes(), {"kind": "array", "dtype": value.dtype.str, "shape": list(value.shape)})
    try:
        return Encoded(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
    except TypeError as error:
        raise InvalidRequest(f"the value is neither JSON, bytes nor an array: {error}", field="value") from None


def decode(about: dict[str, Any], data: bytes) -> Any:
    """Return the bytes or the array that `about` describes.

    Raises:
        MillpondError: it describes something else than `data` is.
    """
    kind = about.get("kind")
    if kind == "bytes":
        return data
    dtype, shape = str(about.get("dtype")), about.get("shape")
    if kind != "array" or not _DTYPE.fullmatch(dtype) or not isinstance(shape, list):
        raise MillpondError(f"a stored value is of a kind this version does not know: {str(about)[:100]}")
    import numpy as np

    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape).copy()
    except (ValueError, TypeError) as error:
        raise MillpondError(f"a stored array is damaged: {error}") from None


def read_entry(text: bytes, now_ms: int) -> tuple[dict[str, Any], Encoded] | None:
    """Return an entry's members for a reply, save where it was found, and its value; None if it is compressed."""
    entry = opened(text)
    about = entry.about
    if about["enc"] != "raw":
        return None
    age_ms, left_ms = max(0, now_ms - entry.created_ms), max(0, entry.created_ms + entry.ttl_ms - now_ms)
    members: dict[str, Any] = {"age": age_ms / 1000, "ttl": left_ms / 1000} | ({} if left_ms else {"stale": True})
    members |= {"model": about["model"], "provider": about["provider"], "epoch": entry.epoch}
    return members, Encoded(entry.data, about.get("value"))


def framed(text: bytes, blob: bytes | None) -> bytes:
    """Return a reply's JSON, followed by the bytes of a value that is none: `#LENGTH`, a line end, JSON, bytes."""
    return b"#%d\n%b%b" % (len(text), text, blob) if blob is not None else text


def split(raw: bytes) -> tuple[bytes, bytes | None]:
    """Return a reply payload's JSON, and the bytes that follow it (None: its value is JSON)."""
    if not raw.startswith(b"#"):
        return raw, None
    length, _, rest = raw[1:].partition(b"\n")
    return rest[: int(length)], rest[int(length) :]
