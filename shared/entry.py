r"""The envelope of a stored answer.

An entry is bytes, so that scripts and workers read only what they need:

    mp1 EPOCH CREATED_MS EXPIRES_MS TAGS\n
    tag\n            (TAGS lines)
    meta JSON\n      {"model": …, "enc": "raw" | "zstd1", "compute_ms": …}
    body             the provider's own JSON, compressed as `enc` says

`zstd1` is zstandard with the raw-content dictionary `dictionary_1.txt`: the shapes of the providers' JSON and phrases
that answers are made of, about a quarter of a short answer. A dictionary in use is never changed; a better one is
`zstd2`, in a file of its own.

`mp1` is the version; whatever does not read as an entry of this version is a miss, never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import orjson
import zstandard

MAGIC = b"mp1 "
MAX_BODY = 64 << 20
_LEVEL = 6  # with the dictionary, higher ones save less than a hundredth
_dictionary = zstandard.ZstdCompressionDict(
    files("shared").joinpath("dictionary_1.txt").read_bytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT
)
_dictionary.precompute_compress(level=_LEVEL)
_compressor = zstandard.ZstdCompressor(level=_LEVEL, dict_data=_dictionary, write_checksum=False)
_decompressor = zstandard.ZstdDecompressor(dict_data=_dictionary)


class Unreadable(ValueError):
    """The bytes are no entry of this version."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer, decompressed. Times in milliseconds of the server's clock."""

    key: str
    epoch: str
    created_ms: int
    expires_ms: int
    tags: tuple[str, ...]
    #: the constant end of a reply's JSON object: `"key":…,"model":…,"body":…}`
    tail: bytes

    @property
    def size(self) -> int:
        """Bytes this entry weighs in a bounded store."""
        return len(self.tail) + 64 * len(self.tags) + 400

    def reply(self, tier: str, now_ms: int, *, collapsed: bool = False) -> bytes:
        """Return the reply payload that serves this entry from `tier` at `now_ms`."""
        return payload(tier, collapsed, "stored", self.created_ms, self.expires_ms, now_ms, self.tail)


def payload(
    tier: str, collapsed: bool, stored: str, created_ms: int, expires_ms: int, now_ms: int, tail: bytes
) -> bytes:
    """Return one reply payload; age and ttl in seconds, `stored` says `stored` or why not."""
    age, ttl = max(0, now_ms - created_ms), max(0, expires_ms - now_ms) if stored == "stored" else 0
    return (
        b'{"tier":"%b","collapsed":%b,"stored":"%b","age":%d.%03d,"ttl":%d.%03d,'
        % (tier.encode(), b"true" if collapsed else b"false", stored.encode(), *divmod(age, 1000), *divmod(ttl, 1000))
    ) + tail


def tail_of(key: str, model: str, body: bytes) -> bytes:
    """Return the constant end of every reply that serves `body`."""
    return b'"key":"%b","model":%b,"body":%b}' % (key.encode(), orjson.dumps(model), body)


def pack(body: bytes, *, model: str, compute_ms: int, compress_above: int) -> tuple[bytes, bytes]:
    """Return (meta JSON, stored body) as `land` takes them."""
    packed, encoding = body, "raw"
    if len(body) > compress_above:
        packed, encoding = _compressor.compress(body), "zstd1"
    return orjson.dumps({"model": model, "enc": encoding, "compute_ms": compute_ms}), packed


def unpack(key: str, text: bytes) -> Entry:
    """Read an entry.

    Raises:
        Unreadable: it is of another version, damaged, or not an entry at all.
    """
    try:
        first, rest = text.split(b"\n", 1)
        magic, epoch, created, expires, count = first.split(b" ")
        if magic + b" " != MAGIC:
            raise Unreadable("unknown version")
        *tags, meta, packed = rest.split(b"\n", int(count) + 1)
        about: dict[str, Any] = orjson.loads(meta)
        if about["enc"] == "zstd1":
            if zstandard.frame_content_size(packed) > MAX_BODY:  # the decompressor would believe it
                raise Unreadable("a body too large")
            body = _decompressor.decompress(packed, max_output_size=MAX_BODY)
        elif about["enc"] == "raw":
            body = packed
        else:
            raise Unreadable(f"unknown encoding {about['enc']!r}")
        return Entry(
            key=key,
            epoch=epoch.decode(),
            created_ms=int(created),
            expires_ms=int(expires),
            tags=tuple(tag.decode() for tag in tags),
            tail=tail_of(key, about["model"], body),
        )
    except (ValueError, KeyError, TypeError, zstandard.ZstdError) as error:
        raise Unreadable(str(error)) from error
