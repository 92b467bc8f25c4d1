"""L1 never holds more than its bounds, nor what expired or was invalidated, and indexes nothing else."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.entry import Entry
from shared.tiers.l1 import L1

KEYS = [f"{n:032x}" for n in range(6)]
TAGS = ["a", "ab", "c"]


def entry(key: str, *tags: str, size: int = 10, expires_ms: int = 1000) -> Entry:
    return Entry(key, "1-0", 0, expires_ms, expires_ms, expires_ms, tags, b"x" * size)


def test_the_least_recently_used_leaves_first() -> None:
    l1 = L1(entries=2, size=1 << 20)
    for key in KEYS[:2]:
        l1.put(entry(key), clock=0)
    l1.get(KEYS[0], 0)
    l1.put(entry(KEYS[2]), clock=0)
    assert [l1.get(key, 0) is not None for key in KEYS[:3]] == [True, False, True]


def test_bytes_are_bounded() -> None:
    l1 = L1(entries=100, size=3 * entry(KEYS[0], size=1000).size)
    for key in KEYS:
        l1.put(entry(key, size=1000), clock=0)
    assert len(l1) == 3
    assert l1.size == 3 * entry(KEYS[0], size=1000).size


def test_what_is_larger_than_all_of_it_is_refused_and_pushes_nothing_out() -> None:
    l1 = L1(entries=100, size=2000)
    l1.put(entry(KEYS[0]), clock=0)
    assert not l1.put(entry(KEYS[1], size=5000), clock=0)
    assert l1.get(KEYS[0], 0)


def test_a_larger_answer_to_the_same_question_does_not_leave_the_old_one() -> None:
    l1 = L1(entries=100, size=2000)
    l1.put(entry(KEYS[0]), clock=0)
    l1.put(entry(KEYS[0], size=5000), clock=0)
    assert l1.get(KEYS[0], 0) is None


def test_zero_entries_turn_it_off() -> None:
    l1 = L1(entries=0, size=1 << 20)
    assert not l1.put(entry(KEYS[0]), clock=0)


def test_an_entry_is_gone_at_its_expiry() -> None:
    l1 = L1(entries=9, size=1 << 20)
    l1.put(entry(KEYS[0], expires_ms=50), clock=0)
    assert l1.get(KEYS[0], 49)
    assert l1.get(KEYS[0], 50) is None
    assert (len(l1), l1.size) == (0, 0)


def test_what_was_read_before_an_invalidation_is_not_held_after_it() -> None:
    l1 = L1(entries=9, size=1 << 20)
    clock = l1.clock
    l1.invalidate(["a"])
    assert not l1.put(entry(KEYS[0], "a"), clock=clock)


class Against(RuleBasedStateMachine):
    """L1 beside a dict that is trimmed by hand."""

    most = 4
    most_bytes = 3 * entry("", size=500).size

    def __init__(self) -> None:
        super().__init__()
        self.l1 = L1(entries=self.most, size=self.most_bytes)
        self.model: OrderedDict[str, Entry] = OrderedDict()

    @rule(
        key=st.sampled_from(KEYS),
        tags=st.lists(st.sampled_from(TAGS), unique=True),
        size=st.integers(0, 900),
        expires=st.integers(0, 20),
    )
    def put(self, key: str, tags: list[str], size: int, expires: int) -> None:
        """Hold an entry."""
        new = entry(key, *tags, size=size, expires_ms=expires)
        self.l1.put(new, clock=self.l1.clock)
        self.model.pop(key, None)
        self.model[key] = new
        while len(self.model) > self.most or sum(e.size for e in self.model.values()) > self.most_bytes:
            self.model.popitem(last=False)

    @rule(key=st.sampled_from(KEYS), now=st.integers(0, 20))
    def get(self, key: str, now: int) -> None:
        """Look one up at some moment."""
        held = self.model.get(key)
        if held is not None and held.expires_ms <= now:
            del self.model[key]
            held = None
        if held is not None:
            self.model.move_to_end(key)
        assert self.l1.get(key, now) == held

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: str) -> None:
        """Forget one."""
        self.l1.drop(key)
        self.model.pop(key, None)

    @rule(
        tags=st.lists(st.sampled_from([*TAGS, "unknown", "all", f"key:{KEYS[0]}", "prefix:a", "prefix:ab"]), max_size=3)
    )
    def invalidate(self, tags: list[str]) -> None:
        """Apply an invalidation."""
        self.l1.invalidate(tags)
        for key, held in list(self.model.items()):
            prefixes = tuple(tag[7:] for tag in tags if tag.startswith("prefix:"))
            if {*held.tags, "all", f"key:{key}"} & set(tags) or any(tag.startswith(prefixes) for tag in held.tags):
                del self.model[key]

    @rule()
    def clear(self) -> None:
        """Forget all."""
        self.l1.clear()
        self.model.clear()

    @invariant()
    def same(self) -> None:
        """Both hold the same, and the index nothing else."""
        assert len(self.l1) == len(self.model)
        assert self.l1.size == sum(e.size for e in self.model.values()) <= self.most_bytes
        indexed = {tag: {k for k, e in self.model.items() if tag in e.tags} for tag in TAGS}
        assert self.l1._tagged == {tag: keys for tag, keys in indexed.items() if keys}


TestAgainstADict = Against.TestCase
TestAgainstADict.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
