"""What one script does by itself: bounds, ties, refusals. Their orders are in test_interleavings.py."""

from __future__ import annotations

import pytest

from shared import keys
from shared.entry import pack
from shared.scripts import SCRIPTS
from tests import scripts_support
from tests.scripts_support import FOREVER, KEY, K, Scripts

scripts = scripts_support.scripts


def test_publish_accepts_as_many_as_there_is_room_for(scripts: Scripts) -> None:
    requests = [part for n in range(5) for part in (f"r{n}", "c", 0, "{}", "")]
    assert scripts.script("publish", [K.requests], 3, *requests) == 3
    assert scripts.script("publish", [K.requests], 3, *requests) == 0
    assert scripts.run("XLEN", K.requests) == 3


def test_publish_leaves_out_empty_directives(scripts: Scripts) -> None:
    scripts.script("publish", [K.requests], 9, "r1", "c", 7, "{}", "", "r2", "c", 7, "{}", '{"ttl":1}')
    said = [dict(zip(f[::2], f[1::2], strict=True)) for _, f in _raw(scripts, K.requests)]
    assert [b"cache" in fields for fields in said] == [False, True]


def _raw(scripts: Scripts, stream: str) -> list[tuple[bytes, list[bytes]]]:
    found = scripts.run("XRANGE", stream, "-", "+")
    return [(at, [part for pair in fields.items() for part in pair]) for at, fields in found]


def test_a_full_queue_begins_nothing_and_acknowledges_nothing(scripts: Scripts) -> None:
    assert scripts.join(scripts.request(), "c r", most=0) == [b"FULL"]
    assert scripts.run("XLEN", K.fills) == 0
    assert scripts.run("XPENDING", K.requests, "lookup")["pending"] == 1
    assert not scripts.run("EXISTS", K.flight(KEY), K.waiters(KEY, "t"))


def test_a_full_queue_still_lets_others_join(scripts: Scripts) -> None:
    scripts.join(scripts.request(), "c r1", most=1)
    assert scripts.join(scripts.request(), "c r2", flight="u", most=1) == [b"JOINED", b"t", 1]


def test_the_first_of_a_batch_begins_and_the_rest_join(scripts: Scripts) -> None:
    assert scripts.join(scripts.request(), "c r1", scripts.request(), "c r2") == [b"BEGUN", b"t", 2]
    assert scripts.waiters() == [b"c r1 0", b"c r2 1"]


def test_a_request_nobody_waits_for_begins_a_flight_without_waiters(scripts: Scripts) -> None:
    assert scripts.join(scripts.request(), "") == [b"BEGUN", b"t", 1]
    assert not scripts.run("EXISTS", K.waiters(KEY, "t"))
    assert scripts.run("PTTL", K.flight(KEY)) > 0


def test_only_owned_messages_of_a_batch_are_joined(scripts: Scripts) -> None:
    mine, other = scripts.request(), scripts.request(reader="someone")
    assert scripts.join(mine, "c r1", other, "c r2") == [b"BEGUN", b"t", 1]
    assert scripts.waiters() == [b"c r1 0"]


def test_the_first_of_a_batch_that_is_still_owned_began_it(scripts: Scripts) -> None:
    other, mine = scripts.request(reader="someone"), scripts.request()
    scripts.join(other, "c r1", mine, "c r2")
    assert scripts.waiters() == [b"c r2 0"]


def test_joining_lengthens_the_life_of_a_flight_and_never_shortens_it(scripts: Scripts) -> None:
    scripts.join(scripts.request(), "c r1", until=FOREVER)
    scripts.join(scripts.request(), "c r2", until=FOREVER - 5000)
    assert scripts.run("PEXPIRETIME", K.flight(KEY)) == FOREVER
    scripts.join(scripts.request(), "c r3", until=FOREVER + 5000)
    assert scripts.run("PEXPIRETIME", K.flight(KEY)) == FOREVER + 5000
    assert scripts.run("PEXPIRETIME", K.waiters(KEY, "t")) == FOREVER + 5000


def test_the_shortest_ttl_aboard_counts(scripts: Scripts) -> None:
    fill = scripts.fly(ttl=50_000)
    scripts.join(scripts.request(), "c r2", ttl=20_000)
    scripts.join(scripts.request(), "c r3", ttl=40_000)
    reply = scripts.land(fill)
    assert reply[3] - reply[1] == 20_000


def test_a_bypass_published_twice_is_computed_once(scripts: Scripts) -> None:
    assert scripts.join(scripts.request(), "c r", flight="c.r", mode="bypass")[0] == b"BEGUN"
    assert scripts.join(scripts.request(), "c r", flight="c.r", mode="bypass")[0] == b"JOINED"
    assert scripts.run("XLEN", K.fills) == 1


def test_an_entry_too_old_for_a_request_is_no_hit(scripts: Scripts) -> None:
    scripts.store("0-0", "a", created=1000)
    assert scripts.join(scripts.request(), "c r", oldest=1000)[0] == b"HIT"
    assert scripts.join(scripts.request(), "c r", oldest=1001)[0] == b"BEGUN"


def test_a_newer_entry_is_not_overwritten(scripts: Scripts) -> None:
    fill = scripts.fly()
    newer = scripts.store("9-9", "a")
    assert scripts.land(fill)[0] == b"superseded"
    assert scripts.run("GET", K.entry(KEY)) == newer


@pytest.mark.parametrize("epoch", ["0-0", "9-8", "8-10"])
def test_an_entry_as_old_or_older_is_replaced_and_leaves_every_l1(scripts: Scripts, epoch: str) -> None:
    fill = scripts.fly()
    before = scripts.store(epoch, "a")
    assert scripts.land(fill, epoch="9-9")[0] == b"stored"
    assert scripts.run("GET", K.entry(KEY)) != before
    ((_, fields),) = _raw(scripts, K.invalidations)
    assert fields == [b"by", b"land", b"tags", b"key:" + KEY.encode()]
    assert not scripts.run("EXISTS", K.tags)


def test_a_first_answer_says_nothing_in_the_log(scripts: Scripts) -> None:
    scripts.land(scripts.fly())
    assert not scripts.run("EXISTS", K.invalidations)


def test_ids_are_compared_as_numbers(scripts: Scripts) -> None:
    fill = scripts.fly()
    scripts.store("10-2", "a")
    assert scripts.land(fill, epoch="9-11")[0] == b"superseded"


def test_a_verdict_keeps_an_answer_out(scripts: Scripts) -> None:
    fill = scripts.fly()
    assert scripts.land(fill, verdict="length")[0] == b"length"
    assert not scripts.run("EXISTS", K.entry(KEY), K.flight(KEY))
    assert scripts.run("GET", K.outcome(KEY, "t")).startswith(b"length\nmp2 ")


def test_landing_twice_changes_nothing_and_tells_the_first_outcome(scripts: Scripts) -> None:
    fill = scripts.fly()
    scripts.land(fill, body=b'{"a":1}')
    entry = scripts.run("GET", K.entry(KEY))
    again = scripts.land(fill, body=b'{"a":2}')
    assert again[0] == b"DONE"
    assert again[3].endswith(b'{"a":1}')
    assert scripts.run("GET", K.entry(KEY)) == entry


def test_an_answer_is_on_probation_only_while_postgresql_keeps_up(scripts: Scripts) -> None:
    assert scripts.land(scripts.fly(), probation=10_000)[0] == b"stored"
    assert scripts.run("PTTL", K.entry(KEY)) > 50_000, "nobody takes it to PostgreSQL"
    scripts.run("XGROUP", "CREATE", K.landed, "persistence", "0", "MKSTREAM")
    assert scripts.land(scripts.fly(flight="u", mode="refresh"), flight="u", probation=10_000)[0] == b"stored"
    assert 0 < scripts.run("PTTL", K.entry(KEY)) <= 10_000
    scripts.run("XTRIM", K.landed, "MAXLEN", 0)
    scripts.run("DEL", K.landed)
    scripts.run("XADD", K.landed, "1-1", "key", "one that has waited for long")
    assert scripts.land(scripts.fly(flight="v", mode="refresh"), flight="v", probation=10_000)[0] == b"stored"
    assert scripts.run("PTTL", K.entry(KEY)) > 50_000


def test_landed_answers_are_appended_only_where_somebody_reads_them(scripts: Scripts) -> None:
    scripts.land(scripts.fly())
    assert not scripts.run("EXISTS", K.landed)


def test_an_answer_with_line_breaks_and_null_bytes_is_stored_as_it_is(scripts: Scripts) -> None:
    body = b'{"a":"\\n"}\n\x00\xff\n'
    scripts.land(scripts.fly(), body=body)
    assert scripts.run("GET", K.entry(KEY)).endswith(body)


@pytest.mark.parametrize(
    "junk", [b"", b"mp1 1-1 1 1 0\n{}\n{}", b"mp2 1-1 1 1 0 0 3\na\n", b"mp2 x 1 1 0 0 0\n", b"\x00\xff"]
)
def test_fetch_deletes_what_is_no_entry(scripts: Scripts, junk: bytes) -> None:
    scripts.run("SET", K.entry(KEY), junk, "PX", 60_000)
    assert scripts.script("fetch", [K.tags, K.entry(KEY)], KEY, "") == [b"0", 2]
    assert not scripts.run("EXISTS", K.entry(KEY))


@pytest.mark.parametrize("tag", ["a", "all", f"key:{KEY}", "prefix:a"])
def test_fetch_deletes_what_was_invalidated(scripts: Scripts, tag: str) -> None:
    scripts.store("1-1", "a")
    scripts.invalidate(tag)
    assert scripts.script("fetch", [K.tags, K.entry(KEY)], KEY, "") == [b"0", 1]
    assert not scripts.run("EXISTS", K.entry(KEY))


def test_fetch_withholds_an_entry_from_a_request_whose_own_tag_was_invalidated(scripts: Scripts) -> None:
    entry = scripts.store("1-1", "a")
    scripts.invalidate("b")
    assert scripts.script("fetch", [K.tags, K.entry(KEY), K.entry(KEY)], KEY, "b", KEY, "") == [b"0", 0, entry]


def test_an_entry_as_new_as_the_invalidation_stays(scripts: Scripts) -> None:
    at = scripts.invalidate("a")
    entry = scripts.store(at, "a")
    assert scripts.script("fetch", [K.tags, K.entry(KEY)], KEY, "a") == [b"0", entry]


def test_the_log_keeps_its_newest(scripts: Scripts) -> None:
    for n in range(1000):
        scripts.script("invalidate", [K.invalidations, K.tags], "t", 100, f"t{n}")
    assert 100 <= scripts.run("XLEN", K.invalidations) < 300
    assert scripts.run("HLEN", K.tags) == 1001


def test_replies_reach_only_who_listens_and_only_in_time(scripts: Scripts) -> None:
    name = keys.reply("c")
    assert scripts.script("reply", [name], FOREVER, 10, "r", "{}") == 0
    assert not scripts.run("EXISTS", name)
    scripts.run("XADD", name, "*", "", "")
    assert scripts.script("reply", [name], FOREVER, 10, "r", "{}") == 1
    assert scripts.script("reply", [name], 1, 10, "r", "{}") == -1
    assert scripts.run("XLEN", name) == 2


def test_retire_takes_only_what_was_asked_and_is_owned(scripts: Scripts) -> None:
    ids = [scripts.request() for _ in range(5)]
    foreign = scripts.request(reader="someone")
    assert scripts.script("retire", [K.requests], "lookup", "w", ids[0], ids[2], foreign) == 2
    left = [at for at, _ in _raw(scripts, K.requests)]
    assert left == [ids[1], ids[3], ids[4], foreign]


def test_retire_survives_a_flush(scripts: Scripts) -> None:
    scripts.run("FLUSHALL")
    assert scripts.script("retire", [K.requests], "lookup", "w", "1-1") == 0


def test_bury_keeps_the_message_the_reason_and_the_count(scripts: Scripts) -> None:
    at = scripts.request("r", body="poison")
    assert scripts.script("bury", [K.requests, K.dead], "lookup", "someone", at, "why", 5, 10) == 0
    assert scripts.script("bury", [K.requests, K.dead], "lookup", "w", at, "why", 5, 10) == 1
    ((_, fields),) = _raw(scripts, K.dead)
    letter = dict(zip(fields[::2], fields[1::2], strict=True))
    assert letter[b"m:body"] == b"poison"
    assert (letter[b"reason"], letter[b"deliveries"], letter[b"id"]) == (b"why", b"5", at)
    assert scripts.run("XLEN", K.requests) == 0


def test_dismiss_removes_a_consumer_only_when_nothing_is_pending_for_it(scripts: Scripts) -> None:
    at = scripts.request()
    assert scripts.script("dismiss", [K.requests], "lookup", "w") == 0
    scripts.script("retire", [K.requests], "lookup", "w", at)
    assert scripts.script("dismiss", [K.requests], "lookup", "w") == 1


def test_what_is_handed_back_can_be_taken_over_at_once_and_was_no_failed_delivery(scripts: Scripts) -> None:
    at = scripts.request()
    scripts.script("hand_back", [K.requests], "lookup", "w", "nobody", 5000)
    assert scripts.redis.xautoclaim(K.requests, "lookup", "other", 5000, justid=True) == [at]
    (pending,) = scripts.redis.xpending_range(K.requests, "lookup", "-", "+", 10)
    assert (pending["consumer"], pending["times_delivered"]) == (b"other", 0)


def test_redeliver_gives_only_what_is_still_owned(scripts: Scripts) -> None:
    mine, foreign = scripts.request(), scripts.request(reader="someone")
    _, counted = scripts.script("redeliver", [K.requests], "lookup", "w", 1, mine, foreign)
    assert [(entry[0], entry[2]) for entry in counted] == [(mine, 2)]
    _, again = scripts.script("redeliver", [K.requests], "lookup", "w", 0, mine)
    assert [(entry[0], entry[2]) for entry in again] == [(mine, 2)]


def test_redeliver_forgets_what_was_deleted_by_hand(scripts: Scripts) -> None:
    at = scripts.request()
    scripts.run("XDEL", K.requests, at)
    assert scripts.script("redeliver", [K.requests], "lookup", "w", 1, at)[1] == []
    assert scripts.run("XPENDING", K.requests, "lookup")["pending"] == 0


def test_a_fill_nobody_waits_for_any_more_is_abandoned(scripts: Scripts) -> None:
    fill = scripts.fly()
    scripts.run("DEL", K.flight(KEY), K.waiters(KEY, "t"))
    names = [K.fills, K.flight(KEY), K.waiters(KEY, "t"), K.outcome(KEY, "t")]
    assert scripts.script("resume", names, "llm", "l", fill, "t") == [b"ABANDONED"]


def test_a_flight_that_made_no_call_tells_the_durable_tier_nothing(scripts: Scripts) -> None:
    scripts.run("XGROUP", "CREATE", K.landed, "persistence", "0", "MKSTREAM")
    scripts.fail(scripts.fly(), call="")
    assert scripts.run("XLEN", K.landed) == 0
    scripts.fail(scripts.fly("u"), flight="u", call="{}")
    ((_, fields),) = _raw(scripts, K.landed)
    assert fields == [b"key", KEY.encode(), b"outcome", b"x", b"call", b"{}"]


def test_every_script_says_what_it_takes_returns_and_closes() -> None:
    for script in SCRIPTS.values():
        header = script.source.rpartition("\n-- " + script.name + ":")[2]
        assert header != script.source
        assert all(part in header for part in ("-- KEYS", "-- ARGV", "-- Returns", "-- Closes:")), script.name


def test_of_two_values_put_in_one_millisecond_the_second_is_the_younger(scripts: Scripts) -> None:
    names = [K.entry(KEY), K.tags, K.landed, K.invalidations]
    meta, _ = pack(b"{}", model="m", compute_ms=1, compress_above=9999)
    scripts.run("XGROUP", "CREATE", K.landed, "persistence", "0", "MKSTREAM")
    put = SCRIPTS["put"].call(names, [KEY, "", "a", 60_000, 0, 0, 60_000, meta, "1", 100, 100])
    pipeline = scripts.redis.pipeline(transaction=True)  # the server's clock stands still within it
    for _ in range(3):
        pipeline.execute_command(*put)
    assert pipeline.execute() == [b"stored"] * 3
    created = [int(fields[b"entry"].split(b" ")[2]) for _, fields in scripts.redis.xrange(K.landed)]
    assert len(set(created)) == 3
    assert created == sorted(created)
