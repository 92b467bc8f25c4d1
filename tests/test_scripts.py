"""What one script does by itself: bounds, ties, refusals. Their orders are in test_interleavings.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest
import redis

from shared import keys
from shared.entry import pack
from shared.keys import PartitionKeys
from shared.scripts import SCRIPTS, Arg
from tests.conftest import Server

K = PartitionKeys(0)
KEY = "0" * 32
FOREVER = 1 << 45


class Pond:
    """A plain connection, and the scripts as functions on it."""

    def __init__(self, connection: redis.Redis) -> None:
        self.redis: Any = connection
        for script in SCRIPTS.values():
            connection.script_load(script.source)
        self.run("XGROUP", "CREATE", K.requests, "lookup", "0", "MKSTREAM")
        self.run("XGROUP", "CREATE", K.fills, "llm", "0", "MKSTREAM")

    def run(self, *command: Any) -> Any:
        """Run a plain command."""
        return self.redis.execute_command(*command)

    def script(self, name: str, names: Sequence[str], *args: Arg) -> Any:
        """Run a script."""
        return self.redis.execute_command(*SCRIPTS[name].call(names, args))

    def request(self, request_id: str = "r", reader: str = "w", **fields: str) -> bytes:
        """Publish and read one request."""
        said = {"id": request_id, "reply": "c", "deadline": "0", "body": "{}"} | fields
        at: bytes = self.run("XADD", K.requests, "*", *(part for pair in said.items() for part in pair))
        self.run("XREADGROUP", "GROUP", "lookup", reader, "STREAMS", K.requests, ">")
        return at

    def join(self, *pairs: bytes | str, flight: str = "t", most: int = 9, until: int = FOREVER, **other: Any) -> Any:
        """Join with these (message id, waiter) pairs."""
        said: dict[str, Any] = {"mode": "default", "oldest": 0, "ttl": 60_000, "store": 1, "tags": "a"} | other
        names = [
            K.requests, K.fills, K.entry(KEY), K.flight(KEY), K.tags, K.waiters(KEY, ""), K.failed(KEY), K.refreshes,
        ]  # fmt: skip
        return self.script(
            "join", names, "lookup", "w", KEY, flight, said["mode"], said["oldest"], said["ttl"], said["store"],
            until, most, "{}", "{}", said["tags"], said.get("lease", 0), "llm", *pairs,
        )  # fmt: skip

    def fly(self, flight: str = "t", **other: Any) -> bytes:
        """Begin a flight and let worker `l` take its fill; return the fill's id."""
        self.join(self.request(), "c r", flight=flight, **other)
        read = self.run("XREADGROUP", "GROUP", "llm", "l", "STREAMS", K.fills, ">")
        at: bytes = read[0][1][-1][0]
        return at

    def land(
        self,
        fill: bytes,
        *,
        epoch: str = "0-0",
        flight: str = "t",
        verdict: str = "",
        body: bytes = b"{}",
        probation: int = 60_000,
    ) -> Any:
        """Land."""
        meta, packed = pack(body, model="m", compute_ms=1, compress_above=9999)
        names = [
            K.fills, K.entry(KEY), K.flight(KEY), K.waiters(KEY, flight), K.outcome(KEY, flight), K.tags, K.landed,
            K.invalidations, K.failed(KEY),
        ]  # fmt: skip
        return self.script(
            "land", names, "llm", "l", fill, KEY, flight, epoch, "a", 60_000, verdict, 60_000, meta, packed, 100,
            0, 0, probation, "{}", "", 100,
        )  # fmt: skip

    def fail(self, fill: bytes, *, flight: str = "t", negative_ms: int = 0, call: str = "{}") -> Any:
        """Fail."""
        names = [
            K.fills, K.flight(KEY), K.waiters(KEY, flight), K.outcome(KEY, flight), K.entry(KEY), K.tags,
            K.failed(KEY), K.landed,
        ]  # fmt: skip
        error = orjson.dumps({"code": "x"})
        return self.script("fail", names, "llm", "l", fill, flight, error, 60_000, KEY, negative_ms, "x", call, 9)

    def store(self, epoch: str, *tags: str, expires: int = FOREVER, created: int = 1) -> bytes:
        """Put an entry into L2 by hand."""
        meta, body = pack(b"{}", model="m", compute_ms=1, compress_above=9999)
        text = f"mp2 {epoch} {created} {expires - created} 0 0 {len(tags)}\n" + "".join(f"{tag}\n" for tag in tags)
        entry = text.encode() + meta + b"\n" + body
        self.run("SET", K.entry(KEY), entry, "PX", 60_000)
        return entry

    def waiters(self) -> list[bytes]:
        """Return who waits, without when each was published."""
        aboard = self.run("LRANGE", K.waiters(KEY, "t"), 0, -1)
        assert all(one.rpartition(b" ")[2].isdigit() for one in aboard)
        return [one.rpartition(b" ")[0] for one in aboard]

    def invalidate(self, *tags: str) -> str:
        """Invalidate."""
        at: bytes = self.script("invalidate", [K.invalidations, K.tags], "t", 100, *tags)
        return at.decode()


@pytest.fixture
def pond(server: Server) -> Any:
    with server.connect() as connection:
        yield Pond(connection)
        connection.flushall()


def test_publish_accepts_as_many_as_there_is_room_for(pond: Pond) -> None:
    requests = [part for n in range(5) for part in (f"r{n}", "c", 0, "{}", "")]
    assert pond.script("publish", [K.requests], 3, *requests) == 3
    assert pond.script("publish", [K.requests], 3, *requests) == 0
    assert pond.run("XLEN", K.requests) == 3


def test_publish_leaves_out_empty_directives(pond: Pond) -> None:
    pond.script("publish", [K.requests], 9, "r1", "c", 7, "{}", "", "r2", "c", 7, "{}", '{"ttl":1}')
    said = [dict(zip(f[::2], f[1::2], strict=True)) for _, f in _raw(pond, K.requests)]
    assert [b"cache" in fields for fields in said] == [False, True]


def _raw(pond: Pond, stream: str) -> list[tuple[bytes, list[bytes]]]:
    found = pond.run("XRANGE", stream, "-", "+")
    return [(at, [part for pair in fields.items() for part in pair]) for at, fields in found]


def test_a_full_queue_begins_nothing_and_acknowledges_nothing(pond: Pond) -> None:
    assert pond.join(pond.request(), "c r", most=0) == [b"FULL"]
    assert pond.run("XLEN", K.fills) == 0
    assert pond.run("XPENDING", K.requests, "lookup")["pending"] == 1
    assert not pond.run("EXISTS", K.flight(KEY), K.waiters(KEY, "t"))


def test_a_full_queue_still_lets_others_join(pond: Pond) -> None:
    pond.join(pond.request(), "c r1", most=1)
    assert pond.join(pond.request(), "c r2", flight="u", most=1) == [b"JOINED", b"t", 1]


def test_the_first_of_a_batch_begins_and_the_rest_join(pond: Pond) -> None:
    assert pond.join(pond.request(), "c r1", pond.request(), "c r2") == [b"BEGUN", b"t", 2]
    assert pond.waiters() == [b"c r1 0", b"c r2 1"]


def test_a_request_nobody_waits_for_begins_a_flight_without_waiters(pond: Pond) -> None:
    assert pond.join(pond.request(), "") == [b"BEGUN", b"t", 1]
    assert not pond.run("EXISTS", K.waiters(KEY, "t"))
    assert pond.run("PTTL", K.flight(KEY)) > 0


def test_only_owned_messages_of_a_batch_are_joined(pond: Pond) -> None:
    mine, other = pond.request(), pond.request(reader="someone")
    assert pond.join(mine, "c r1", other, "c r2") == [b"BEGUN", b"t", 1]
    assert pond.waiters() == [b"c r1 0"]


def test_the_first_of_a_batch_that_is_still_owned_began_it(pond: Pond) -> None:
    other, mine = pond.request(reader="someone"), pond.request()
    pond.join(other, "c r1", mine, "c r2")
    assert pond.waiters() == [b"c r2 0"]


def test_joining_lengthens_the_life_of_a_flight_and_never_shortens_it(pond: Pond) -> None:
    pond.join(pond.request(), "c r1", until=FOREVER)
    pond.join(pond.request(), "c r2", until=FOREVER - 5000)
    assert pond.run("PEXPIRETIME", K.flight(KEY)) == FOREVER
    pond.join(pond.request(), "c r3", until=FOREVER + 5000)
    assert pond.run("PEXPIRETIME", K.flight(KEY)) == FOREVER + 5000
    assert pond.run("PEXPIRETIME", K.waiters(KEY, "t")) == FOREVER + 5000


def test_the_shortest_ttl_aboard_counts(pond: Pond) -> None:
    fill = pond.fly(ttl=50_000)
    pond.join(pond.request(), "c r2", ttl=20_000)
    pond.join(pond.request(), "c r3", ttl=40_000)
    reply = pond.land(fill)
    assert reply[3] - reply[1] == 20_000


def test_a_bypass_published_twice_is_computed_once(pond: Pond) -> None:
    assert pond.join(pond.request(), "c r", flight="c.r", mode="bypass")[0] == b"BEGUN"
    assert pond.join(pond.request(), "c r", flight="c.r", mode="bypass")[0] == b"JOINED"
    assert pond.run("XLEN", K.fills) == 1


def test_an_entry_too_old_for_a_request_is_no_hit(pond: Pond) -> None:
    pond.store("0-0", "a", created=1000)
    assert pond.join(pond.request(), "c r", oldest=1000)[0] == b"HIT"
    assert pond.join(pond.request(), "c r", oldest=1001)[0] == b"BEGUN"


def test_a_newer_entry_is_not_overwritten(pond: Pond) -> None:
    fill = pond.fly()
    newer = pond.store("9-9", "a")
    assert pond.land(fill)[0] == b"superseded"
    assert pond.run("GET", K.entry(KEY)) == newer


@pytest.mark.parametrize("epoch", ["0-0", "9-8", "8-10"])
def test_an_entry_as_old_or_older_is_replaced_and_leaves_every_l1(pond: Pond, epoch: str) -> None:
    fill = pond.fly()
    before = pond.store(epoch, "a")
    assert pond.land(fill, epoch="9-9")[0] == b"stored"
    assert pond.run("GET", K.entry(KEY)) != before
    ((_, fields),) = _raw(pond, K.invalidations)
    assert fields == [b"by", b"land", b"tags", b"key:" + KEY.encode()]
    assert not pond.run("EXISTS", K.tags)


def test_a_first_answer_says_nothing_in_the_log(pond: Pond) -> None:
    pond.land(pond.fly())
    assert not pond.run("EXISTS", K.invalidations)


def test_ids_are_compared_as_numbers(pond: Pond) -> None:
    fill = pond.fly()
    pond.store("10-2", "a")
    assert pond.land(fill, epoch="9-11")[0] == b"superseded"


def test_a_verdict_keeps_an_answer_out(pond: Pond) -> None:
    fill = pond.fly()
    assert pond.land(fill, verdict="length")[0] == b"length"
    assert not pond.run("EXISTS", K.entry(KEY), K.flight(KEY))
    assert pond.run("GET", K.outcome(KEY, "t")).startswith(b"length\nmp2 ")


def test_landing_twice_changes_nothing_and_tells_the_first_outcome(pond: Pond) -> None:
    fill = pond.fly()
    pond.land(fill, body=b'{"a":1}')
    entry = pond.run("GET", K.entry(KEY))
    again = pond.land(fill, body=b'{"a":2}')
    assert again[0] == b"DONE"
    assert again[3].endswith(b'{"a":1}')
    assert pond.run("GET", K.entry(KEY)) == entry


def test_an_answer_is_on_probation_only_while_postgresql_keeps_up(pond: Pond) -> None:
    assert pond.land(pond.fly(), probation=10_000)[0] == b"stored"
    assert pond.run("PTTL", K.entry(KEY)) > 50_000, "nobody takes it to PostgreSQL"
    pond.run("XGROUP", "CREATE", K.landed, "persistence", "0", "MKSTREAM")
    assert pond.land(pond.fly(flight="u", mode="refresh"), flight="u", probation=10_000)[0] == b"stored"
    assert 0 < pond.run("PTTL", K.entry(KEY)) <= 10_000
    pond.run("XTRIM", K.landed, "MAXLEN", 0)
    pond.run("DEL", K.landed)
    pond.run("XADD", K.landed, "1-1", "key", "one that has waited for long")
    assert pond.land(pond.fly(flight="v", mode="refresh"), flight="v", probation=10_000)[0] == b"stored"
    assert pond.run("PTTL", K.entry(KEY)) > 50_000


def test_landed_answers_are_appended_only_where_somebody_reads_them(pond: Pond) -> None:
    pond.land(pond.fly())
    assert not pond.run("EXISTS", K.landed)


def test_an_answer_with_line_breaks_and_null_bytes_is_stored_as_it_is(pond: Pond) -> None:
    body = b'{"a":"\\n"}\n\x00\xff\n'
    pond.land(pond.fly(), body=body)
    assert pond.run("GET", K.entry(KEY)).endswith(body)


@pytest.mark.parametrize(
    "junk", [b"", b"mp1 1-1 1 1 0\n{}\n{}", b"mp2 1-1 1 1 0 0 3\na\n", b"mp2 x 1 1 0 0 0\n", b"\x00\xff"]
)
def test_fetch_deletes_what_is_no_entry(pond: Pond, junk: bytes) -> None:
    pond.run("SET", K.entry(KEY), junk, "PX", 60_000)
    assert pond.script("fetch", [K.tags, K.entry(KEY)], KEY, "") == [b"0", 2]
    assert not pond.run("EXISTS", K.entry(KEY))


@pytest.mark.parametrize("tag", ["a", "all", f"key:{KEY}", "prefix:a"])
def test_fetch_deletes_what_was_invalidated(pond: Pond, tag: str) -> None:
    pond.store("1-1", "a")
    pond.invalidate(tag)
    assert pond.script("fetch", [K.tags, K.entry(KEY)], KEY, "") == [b"0", 1]
    assert not pond.run("EXISTS", K.entry(KEY))


def test_fetch_withholds_an_entry_from_a_request_whose_own_tag_was_invalidated(pond: Pond) -> None:
    entry = pond.store("1-1", "a")
    pond.invalidate("b")
    assert pond.script("fetch", [K.tags, K.entry(KEY), K.entry(KEY)], KEY, "b", KEY, "") == [b"0", 0, entry]


def test_an_entry_as_new_as_the_invalidation_stays(pond: Pond) -> None:
    at = pond.invalidate("a")
    entry = pond.store(at, "a")
    assert pond.script("fetch", [K.tags, K.entry(KEY)], KEY, "a") == [b"0", entry]


def test_the_log_keeps_its_newest(pond: Pond) -> None:
    for n in range(1000):
        pond.script("invalidate", [K.invalidations, K.tags], "t", 100, f"t{n}")
    assert 100 <= pond.run("XLEN", K.invalidations) < 300
    assert pond.run("HLEN", K.tags) == 1001


def test_replies_reach_only_who_listens_and_only_in_time(pond: Pond) -> None:
    name = keys.reply("c")
    assert pond.script("reply", [name], FOREVER, 10, "r", "{}") == 0
    assert not pond.run("EXISTS", name)
    pond.run("XADD", name, "*", "", "")
    assert pond.script("reply", [name], FOREVER, 10, "r", "{}") == 1
    assert pond.script("reply", [name], 1, 10, "r", "{}") == -1
    assert pond.run("XLEN", name) == 2


def test_retire_takes_only_what_was_asked_and_is_owned(pond: Pond) -> None:
    ids = [pond.request() for _ in range(5)]
    foreign = pond.request(reader="someone")
    assert pond.script("retire", [K.requests], "lookup", "w", ids[0], ids[2], foreign) == 2
    left = [at for at, _ in _raw(pond, K.requests)]
    assert left == [ids[1], ids[3], ids[4], foreign]


def test_retire_survives_a_flush(pond: Pond) -> None:
    pond.run("FLUSHALL")
    assert pond.script("retire", [K.requests], "lookup", "w", "1-1") == 0


def test_bury_keeps_the_message_the_reason_and_the_count(pond: Pond) -> None:
    at = pond.request("r", body="poison")
    assert pond.script("bury", [K.requests, K.dead], "lookup", "someone", at, "why", 5, 10) == 0
    assert pond.script("bury", [K.requests, K.dead], "lookup", "w", at, "why", 5, 10) == 1
    ((_, fields),) = _raw(pond, K.dead)
    letter = dict(zip(fields[::2], fields[1::2], strict=True))
    assert letter[b"m:body"] == b"poison"
    assert (letter[b"reason"], letter[b"deliveries"], letter[b"id"]) == (b"why", b"5", at)
    assert pond.run("XLEN", K.requests) == 0


def test_dismiss_removes_a_consumer_only_when_nothing_is_pending_for_it(pond: Pond) -> None:
    at = pond.request()
    assert pond.script("dismiss", [K.requests], "lookup", "w") == 0
    pond.script("retire", [K.requests], "lookup", "w", at)
    assert pond.script("dismiss", [K.requests], "lookup", "w") == 1


def test_what_is_handed_back_can_be_taken_over_at_once_and_was_no_failed_delivery(pond: Pond) -> None:
    at = pond.request()
    pond.script("hand_back", [K.requests], "lookup", "w", "nobody", 5000)
    assert pond.redis.xautoclaim(K.requests, "lookup", "other", 5000, justid=True) == [at]
    (pending,) = pond.redis.xpending_range(K.requests, "lookup", "-", "+", 10)
    assert (pending["consumer"], pending["times_delivered"]) == (b"other", 0)


def test_redeliver_gives_only_what_is_still_owned(pond: Pond) -> None:
    mine, foreign = pond.request(), pond.request(reader="someone")
    _, counted = pond.script("redeliver", [K.requests], "lookup", "w", 1, mine, foreign)
    assert [(entry[0], entry[2]) for entry in counted] == [(mine, 2)]
    _, again = pond.script("redeliver", [K.requests], "lookup", "w", 0, mine)
    assert [(entry[0], entry[2]) for entry in again] == [(mine, 2)]


def test_redeliver_forgets_what_was_deleted_by_hand(pond: Pond) -> None:
    at = pond.request()
    pond.run("XDEL", K.requests, at)
    assert pond.script("redeliver", [K.requests], "lookup", "w", 1, at)[1] == []
    assert pond.run("XPENDING", K.requests, "lookup")["pending"] == 0


def test_a_fill_nobody_waits_for_any_more_is_abandoned(pond: Pond) -> None:
    fill = pond.fly()
    pond.run("DEL", K.flight(KEY), K.waiters(KEY, "t"))
    names = [K.fills, K.flight(KEY), K.waiters(KEY, "t"), K.outcome(KEY, "t")]
    assert pond.script("resume", names, "llm", "l", fill, "t") == [b"ABANDONED"]


def test_an_error_leaves_the_stored_answer_alone(pond: Pond) -> None:
    fill = pond.fly(mode="refresh")
    entry = pond.store("0-0", "a")
    assert pond.fail(fill)[0] == b"FAILED"
    assert pond.run("GET", K.entry(KEY)) == entry


def _placate(pond: Pond, fill: bytes, told: int = 0) -> Any:
    names = [K.fills, K.flight(KEY), K.waiters(KEY, "t"), K.entry(KEY), K.tags]
    return pond.script("placate", names, "llm", "l", fill, "t", KEY, told)


def test_who_waits_may_have_what_is_stored_and_nobody_twice(pond: Pond) -> None:
    fill = pond.fly(mode="refresh")
    entry = pond.store("0-0", "a")
    assert _placate(pond, fill)[3] == entry
    assert _placate(pond, fill, told=1) == [b"NONE"]
    pond.join(pond.request(), "c r2", mode="refresh")
    ((waiter,),) = (_placate(pond, fill, told=1)[2],)
    assert waiter.startswith(b"c r2 3 ")


@pytest.mark.parametrize("why", ["gone", "invalidated", "foreign tag", "replaced", "many-tags"])
def test_what_may_not_be_told_placates_nobody(pond: Pond, why: str) -> None:
    fill = pond.fly(mode="refresh", tags="a\nb")
    pond.store("0-0", "a", expires=1 if why == "gone" else FOREVER)
    if why in ("invalidated", "foreign tag"):
        pond.invalidate("a" if why == "invalidated" else "b")
    elif why != "gone":
        field, value = ("token", "u") if why == "replaced" else ("store", why)
        pond.run("HSET", K.flight(KEY), field, value)
    assert _placate(pond, fill) == [b"NONE"]
    assert pond.fail(fill)[3].startswith(b"failed\n")


def test_who_lost_the_lease_placates_nobody(pond: Pond) -> None:
    fill = pond.fly(mode="refresh")
    pond.store("0-0", "a")
    pond.run("XCLAIM", K.fills, "llm", "another", 0, fill)
    assert _placate(pond, fill) == [b"LOST"]


def test_failures_in_a_row_are_told_for_longer_each_time_and_never_beyond_a_minute(pond: Pond) -> None:
    spans = []
    for failures in range(1, 9):
        token = f"t{failures}"
        pond.fail(pond.fly(token, mode="refresh"), flight=token, negative_ms=1000)
        line, error = pond.run("GET", K.failed(KEY)).split(b"\n")
        until, count = map(int, line.split())
        seconds, micros = pond.run("TIME")
        spans.append(round((until - seconds * 1000 - micros / 1000) / 1000))
        assert (count, orjson.loads(error)) == (failures, {"code": "x"})
        assert pond.run("PTTL", K.failed(KEY)) > spans[-1] * 5000
    assert spans == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_flight_that_made_no_call_tells_the_durable_tier_nothing(pond: Pond) -> None:
    pond.run("XGROUP", "CREATE", K.landed, "persistence", "0", "MKSTREAM")
    pond.fail(pond.fly(), call="")
    assert pond.run("XLEN", K.landed) == 0
    pond.fail(pond.fly("u"), flight="u", call="{}")
    ((_, fields),) = _raw(pond, K.landed)
    assert fields == [b"key", KEY.encode(), b"outcome", b"x", b"call", b"{}"]


def test_every_script_says_what_it_takes_returns_and_closes() -> None:
    for script in SCRIPTS.values():
        header = script.source.rpartition("\n-- " + script.name + ":")[2]
        assert header != script.source
        assert all(part in header for part in ("-- KEYS", "-- ARGV", "-- Returns", "-- Closes:")), script.name
