"""An entry read back is the entry stored; whatever else lies there is unreadable, and nothing worse."""

from __future__ import annotations

import contextlib
from hashlib import blake2b
from importlib.resources import files

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shared.entry import MAX_BODY, pack, payload, tail_of, unpack
from shared.envelope import Unreadable

KEY = "0" * 32
BODY = orjson.dumps({"choices": [{"message": {"content": "the wheel turns " * 40}}]})


def stored(body: bytes, tags: list[str], *, model: str = "m", above: int = 256, epoch: str = "7-1") -> bytes:
    """Return an entry as `land` writes it."""
    meta, packed = pack(body, model=model, compute_ms=12, compress_above=above)
    head = f"mp2 {epoch} 1000 60000 30 7 {len(tags)}\n" + "".join(f"{tag}\n" for tag in tags)
    return head.encode() + meta + b"\n" + packed


TAGS = st.lists(st.from_regex(r"[^\s\x00-\x1f\x7f]{1,20}", fullmatch=True).filter(str.isprintable), max_size=5)


@given(body=st.binary(max_size=3000), tags=TAGS, model=st.text(min_size=1, max_size=20), above=st.integers(0, 4000))
def test_what_was_packed_is_unpacked(body: bytes, tags: list[str], model: str, above: int) -> None:
    entry = unpack(KEY, stored(body, tags, model=model, above=above))
    assert (entry.key, entry.epoch, entry.created_ms) == (KEY, "7-1", 1000)
    assert (entry.fresh_ms, entry.expires_ms, entry.gone_ms) == (61000, 61030, 61037)
    assert entry.tags == tuple(tags)
    assert entry.tail == tail_of(KEY, model, body, provider=None, epoch="7-1")


@given(st.binary(max_size=300))
def test_no_bytes_are_worse_than_unreadable(noise: bytes) -> None:
    with pytest.raises(Unreadable):
        unpack(KEY, noise)


@given(st.data())
def test_damage_is_unreadable_or_harmless(data: st.DataObject) -> None:
    text = bytearray(stored(BODY, ["a", "b"]))
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Unreadable):
        unpack(KEY, bytes(text[: data.draw(st.integers(0, len(text)))]))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"mp3 7-1 1000 60000 0 0 0\n{}\n{}",
        b"mp2 7-1 1000 60000 0 0 9\na\n{}\n{}",
        b"mp2 7-1 x 60000 0 0 0\n{}\n{}",
        b'mp2 7-1 1000 60000 0 0 0\n{"model":"m","enc":"br"}\n{}',
        b'mp2 7-1 1000 60000 0 0 0\n{"model":"m"}\n{}',
        b'mp2 7-1 1000 60000 0 0 0\n["m","raw"]\n{}',
        b'mp2 7-1 1000 60000 0 0 0\n{"model":"m","enc":"zstd1"}\nnot zstd',
        b"mp2 7-1 1000 60000 0 0 1\n\xff\n" + b'{"model":"m","enc":"raw"}\n{}',
    ],
)
def test_what_is_no_entry_of_this_version_is_unreadable(text: bytes) -> None:
    with pytest.raises(Unreadable):
        unpack(KEY, text)


def test_a_body_that_claims_to_be_huge_is_unreadable() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(MAX_BODY + 1))
    meta = orjson.dumps({"model": "m", "enc": "zstd1", "compute_ms": 1})
    with pytest.raises(Unreadable):
        unpack(KEY, b"mp2 7-1 1000 60000 0 0 0\n" + meta + b"\n" + bomb)


def test_a_body_that_claims_an_absurd_size_is_unreadable() -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + b"\x01\x00\x00"
    meta = orjson.dumps({"model": "m", "enc": "zstd1", "compute_ms": 1})
    with pytest.raises(Unreadable):
        unpack(KEY, b"mp2 7-1 1000 60000 0 0 0\n" + meta + b"\n" + frame)


def test_long_bodies_are_compressed_and_short_ones_are_not() -> None:
    assert len(pack(BODY, model="m", compute_ms=1, compress_above=256)[1]) < len(BODY) / 4
    assert pack(BODY, model="m", compute_ms=1, compress_above=len(BODY))[1] == BODY


def test_a_reply_is_json_with_times_in_seconds() -> None:
    entry = unpack(KEY, stored(BODY, ["a"]))
    reply = orjson.loads(entry.reply("l1", 3500))
    assert reply == {
        "tier": "l1", "collapsed": False, "stored": "stored", "age": 2.5, "ttl": 57.5,
        "key": KEY, "model": "m", "provider": None, "epoch": "7-1", "body": orjson.loads(BODY),
    }  # fmt: skip


def test_age_and_ttl_are_never_negative() -> None:
    reply = orjson.loads(payload("llm", True, "stored", 1000, 2000, 500, b'"body":{}}'))
    assert (reply["age"], reply["ttl"]) == (0, 1.5)
    assert orjson.loads(payload("llm", True, "stored", 1000, 2000, 9000, b'"body":{}}'))["ttl"] == 0


def test_an_answer_that_is_not_stored_has_no_ttl() -> None:
    assert orjson.loads(payload("llm", False, "length", 1000, 2000, 1000, b'"body":{}}'))["ttl"] == 0


def test_the_dictionary_of_stored_answers_never_changes() -> None:
    """Entries in Redis were packed with it: a better one needs a new name and a new `enc`."""
    text = files("shared").joinpath("dictionary_1.txt").read_bytes()
    assert blake2b(text, digest_size=16).hexdigest() == "3451201df991b5703881cd4d6a6f35d9"
