"""What the scripts do where there is no answer: the error, and the entry that stands in for it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests import scripts_support
from tests.scripts_support import FOREVER, KEY, K, Scripts

scripts = scripts_support.scripts


def test_an_error_leaves_the_stored_answer_alone(scripts: Scripts) -> None:
    fill = scripts.fly(mode="refresh")
    entry = scripts.store("0-0", "a")
    assert scripts.fail(fill)[0] == b"FAILED"
    assert scripts.run("GET", K.entry(KEY)) == entry


def _placate(scripts: Scripts, fill: bytes, told: int = 0) -> Any:
    names = [K.fills, K.flight(KEY), K.waiters(KEY, "t"), K.entry(KEY), K.tags]
    return scripts.script("placate", names, "llm", "l", fill, "t", KEY, told)


def test_who_waits_may_have_what_is_stored_and_nobody_twice(scripts: Scripts) -> None:
    fill = scripts.fly(mode="refresh")
    entry = scripts.store("0-0", "a")
    assert _placate(scripts, fill)[3] == entry
    assert _placate(scripts, fill, told=1) == [b"NONE"]
    scripts.join(scripts.request(), "c r2", mode="refresh")
    ((waiter,),) = (_placate(scripts, fill, told=1)[2],)
    assert waiter.startswith(b"c r2 3 ")


@pytest.mark.parametrize("why", ["gone", "invalidated", "foreign tag", "replaced", "many-tags"])
def test_what_may_not_be_told_placates_nobody(scripts: Scripts, why: str) -> None:
    fill = scripts.fly(mode="refresh", tags="a\nb")
    scripts.store("0-0", "a", expires=1 if why == "gone" else FOREVER)
    if why in ("invalidated", "foreign tag"):
        scripts.invalidate("a" if why == "invalidated" else "b")
    elif why != "gone":
        field, value = ("token", "u") if why == "replaced" else ("store", why)
        scripts.run("HSET", K.flight(KEY), field, value)
    assert _placate(scripts, fill) == [b"NONE"]
    assert scripts.fail(fill)[3].startswith(b"failed\n")


def test_who_lost_the_lease_placates_nobody(scripts: Scripts) -> None:
    fill = scripts.fly(mode="refresh")
    scripts.store("0-0", "a")
    scripts.run("XCLAIM", K.fills, "llm", "another", 0, fill)
    assert _placate(scripts, fill) == [b"LOST"]


def test_failures_in_a_row_are_told_for_longer_each_time_and_never_beyond_a_minute(scripts: Scripts) -> None:
    spans = []
    for failures in range(1, 9):
        token = f"t{failures}"
        scripts.fail(scripts.fly(token, mode="refresh"), flight=token, negative_ms=1000)
        line, error = scripts.run("GET", K.failed(KEY)).split(b"\n")
        until, count = map(int, line.split())
        seconds, micros = scripts.run("TIME")
        spans.append(round((until - seconds * 1000 - micros / 1000) / 1000))
        assert (count, orjson.loads(error)) == (failures, {"code": "x"})
        assert scripts.run("PTTL", K.failed(KEY)) > spans[-1] * 5000
    assert spans == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("why", ["", "gone", "invalidated", "foreign tag", "many-tags"])
def test_what_may_not_be_told_does_not_stand_in_for_an_applications_value_either(scripts: Scripts, why: str) -> None:
    scripts.store("0-0", "a", expires=1 if why == "gone" else FOREVER)
    scripts.join(scripts.request(), "c r", mode="refresh", tags="a\nb", lease=60_000)
    if why in ("invalidated", "foreign tag"):
        scripts.invalidate("a" if why == "invalidated" else "b")
    elif why == "many-tags":
        scripts.run("HSET", K.flight(KEY), "store", why)
    names = [K.flight(KEY), K.waiters(KEY, "t"), K.outcome(KEY, "t"), K.entry(KEY), K.tags]
    reason, *_, kept = scripts.script("lead_fail", names, "t", 60_000, 0, KEY, 1)
    assert (reason, bool(kept)) == (b"failed", not why)
