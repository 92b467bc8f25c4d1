r"""The envelope of a stored answer.

An entry is bytes, so that scripts and workers read only what they need:

    mp2 EPOCH CREATED TTL STALE ERROR TAGS\n
    tag\n            (TAGS lines)
    meta JSON\n      {"model", "enc": "raw" | "zstd1", "compute_ms", "provider", "tokens": [prompt, completion], "cost"}
    body             the provider's own JSON, compressed as `enc` says

CREATED is in milliseconds of the server's clock; the three spans that follow each other, in milliseconds too: TTL, for
which the answer is fresh; STALE, for which it is then served while it is refreshed; ERROR, for which it then serves
only where no fresh one can be had. `provider` and `cost` (dollars) are null where they are not known.

A value that is no JSON carries `"value"` in its meta: `{"kind": "bytes"}`, or `{"kind": "array", "dtype", "shape"}`;
its body is those bytes (of the array in C order).

`zstd1` is zstandard with the raw-content dictionary `dictionary_1.txt`: the shapes of the providers' JSON and phrases
that answers are made of, about a quarter of a short answer. A dictionary in use is never changed; a better one is
`zstd2`, in a file of its own.

`mp2` is the version; whatever does not read as an entry of this version is a miss, never an exception.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import orjson
import zstandard

from shared.envelope import Unreadable, opened
from shared.values import framed

MAX_BODY = 64 << 20
_LEVEL = 6  # with the dictionary, higher ones save less than a hundredth
_dictionary = zstandard.ZstdCompressionDict(
    files("shared").joinpath("dictionary_1.txt").read_bytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT
)
_dictionary.precompute_compress(level=_LEVEL)
_compressor = zstandard.ZstdCompressor(level=_LEVEL, dict_data=_dictionary, write_checksum=False)
_decompressor = zstandard.ZstdDecompressor(dict_data=_dictionary)


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer, decompressed. Times in milliseconds of the server's clock.

    Fresh until `fresh_ms`, served (stale) until `expires_ms`, kept for want of a better one until `gone_ms`.
    """

    key: str
    epoch: str
    created_ms: int
    fresh_ms: int
    expires_ms: int
    gone_ms: int
    tags: tuple[str, ...]
    #: the constant end of a reply's JSON object: `"key":…,"model":…,"provider":…,"epoch":…,"body":…}`
    tail: bytes
    #: a value that is no JSON, perhaps an empty one; it follows the reply's JSON
    blob: bytes | None = None
    compute_ms: int = 0
    tokens: tuple[int, int] = (0, 0)
    cost: float | None = None

    @property
    def size(self) -> int:
        """Bytes this entry weighs in a bounded store."""
        return len(self.tail) + len(self.blob or b"") + 64 * len(self.tags) + 400

    def reply(self, tier: str, now_ms: int, *, collapsed: bool = False, degraded: bool = False) -> bytes:
        """Return the reply payload that serves this entry from `tier` at `now_ms`."""
        text = payload(tier, collapsed, "stored", self.created_ms, self.fresh_ms, now_ms, self.tail, degraded=degraded)
        return text if self.blob is None else framed(text, self.blob)


def payload(
    tier: str,
    collapsed: bool,
    stored: str,
    created_ms: int,
    fresh_ms: int,
    now_ms: int,
    tail: bytes,
    *,
    degraded: bool = False,
) -> bytes:
    """Return one reply payload; age and ttl in seconds, `stored` says `stored` or why not."""
    is_stored = stored == "stored"
    age_ms = now_ms - created_ms if now_ms > created_ms else 0
    ttl_ms = fresh_ms - now_ms if is_stored and fresh_ms > now_ms else 0
    marks = b'"stale":true,' if is_stored and not ttl_ms else b""
    if degraded:
        marks += b'"degraded":true,'
    return b'{"tier":"%b","collapsed":%b,"stored":"%b","age":%.3f,"ttl":%.3f,%b%b' % (
        tier.encode(),
        b"true" if collapsed else b"false",
        stored.encode(),
        age_ms / 1000,
        ttl_ms / 1000,
        marks,
        tail,
    )


def tail_of(key: str, model: str, body: bytes, *, provider: str | None, epoch: str) -> bytes:
    """Return the constant end of every reply that serves `body`."""
    return b'"key":"%b","model":%b,"provider":%b,"epoch":"%b","body":%b}' % (
        key.encode(),
        orjson.dumps(model),
        orjson.dumps(provider),
        epoch.encode(),
        body,
    )


def pack(
    body: bytes,
    *,
    model: str,
    compute_ms: int,
    compress_above: int,
    provider: str | None = None,
    tokens: tuple[int, int] = (0, 0),
    cost: float | None = None,
    value: dict[str, Any] | None = None,
) -> tuple[bytes, bytes]:
    """Return (meta JSON, stored body) as `land` takes them."""
    packed, encoding = body, "raw"
    if len(body) > compress_above and (value is None or value["kind"] != "array"):  # vectors do not compress
        packed, encoding = _compressor.compress(body), "zstd1"
    about: dict[str, Any] = {"model": model, "enc": encoding, "compute_ms": compute_ms, "provider": provider}
    about |= {"tokens": tokens, "cost": cost} | ({"value": value} if value else {})
    return orjson.dumps(about), packed


def unpack(key: str, text: bytes) -> Entry:
    """Read an entry.

    Raises:
        Unreadable: it is of another version, damaged, or not an entry at all.
    """
    try:
        head = opened(text)
        about = head.about
        body, blob = _decoded(about["enc"], head.data), None
        if described := about.get("value"):
            body, blob = orjson.dumps(described), body
        fresh_ms = head.created_ms + head.ttl_ms
        prompt_tokens, completion_tokens = about["tokens"]
        return Entry(
            key=key,
            epoch=head.epoch,
            created_ms=head.created_ms,
            fresh_ms=fresh_ms,
            expires_ms=fresh_ms + head.stale_ms,
            gone_ms=fresh_ms + head.stale_ms + head.error_ms,
            tags=head.tags,
            tail=tail_of(key, about["model"], body, provider=about["provider"], epoch=head.epoch),
            blob=blob,
            compute_ms=int(about["compute_ms"]),
            tokens=(int(prompt_tokens), int(completion_tokens)),
            cost=about["cost"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, zstandard.ZstdError) as error_:
        raise Unreadable(str(error_)) from error_


def _decoded(encoding: str, packed: bytes) -> bytes:
    if encoding == "raw":
        return packed
    if encoding != "zstd1":
        raise Unreadable(f"unknown encoding {encoding!r}")
    if zstandard.frame_content_size(packed) > MAX_BODY:  # the decompressor would believe it
        raise Unreadable("a body too large")
    return _decompressor.decompress(packed, max_output_size=MAX_BODY)
