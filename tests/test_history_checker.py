"""The checker of histories finds what must not happen, and nothing else."""

from __future__ import annotations

import pytest

from tests.witness import Ask, Computation, History, Invalidation

KEY = "0" * 32
LABELS = frozenset({"doc:1", "profile:response"})


def history(*asks: Ask, computed: dict[int, tuple[int, int | None]], forgot: tuple[Invalidation, ...] = ()) -> History:
    computations = {number: Computation(number, *when) for number, when in computed.items()}
    return History(computations, list(forgot), list(asks))


def ask(
    begun: int, returned: int, number: int = 1, tier: str = "l2", *, epoch: str = "1-0", stored: bool = True
) -> Ask:
    return Ask(KEY, 0, LABELS, begun, returned, number, tier, stored, epoch)


def forgot(begun: int, returned: int, *labels: str, at: str = "5-0") -> Invalidation:
    return Invalidation(frozenset(labels or ("doc:1",)), begun, returned, {0: at})


FINE: dict[str, History] = {
    "a hit": history(ask(3, 4), computed={1: (1, 2)}),
    "asked before the invalidation returned": history(ask(5, 9), computed={1: (1, 2)}, forgot=(forgot(4, 6),)),
    "another label": history(ask(7, 8), computed={1: (1, 2)}, forgot=(forgot(4, 6, "doc:2", "prefix:doc:2"),)),
    "computed anew": history(ask(7, 10, epoch="5-0", tier="llm"), computed={1: (8, 9)}, forgot=(forgot(4, 6),)),
    "overtaken and not stored": history(
        ask(1, 9, tier="llm", stored=False), computed={1: (2, 8)}, forgot=(forgot(4, 6),)
    ),
    "landed while it was invalidated": history(ask(1, 9, tier="llm"), computed={1: (2, 5)}, forgot=(forgot(4, 6),)),
    "the newer one was invalidated": history(
        ask(3, 4, epoch="3-0", tier="llm"),
        ask(5, 8),
        computed={1: (1, 2)},
        forgot=(forgot(4, 6, at="0-5"),),
    ),
}
WRONG: dict[str, tuple[str, History]] = {
    "no outcome": ("I2", history(Ask(KEY, 0, LABELS, 1), computed={})),
    "an answer nobody computed": ("nobody computed", history(ask(1, 2, 7), computed={})),
    "a computation older than the invalidation": (
        "I3",
        history(ask(7, 8, epoch="9-0"), computed={1: (1, 2)}, forgot=(forgot(4, 6),)),
    ),
    "a flight older than the invalidation": (
        "I3",
        history(ask(7, 10, epoch="4-9", tier="llm"), computed={1: (8, 9)}, forgot=(forgot(4, 6),)),
    ),
    "its key": ("I3", history(ask(7, 8), computed={1: (1, 2)}, forgot=(forgot(4, 6, f"key:{KEY}"),))),
    "all": ("I3", history(ask(7, 8), computed={1: (1, 2)}, forgot=(forgot(4, 6, "all"),))),
    "a prefix": ("I3", history(ask(7, 8), computed={1: (1, 2)}, forgot=(forgot(4, 6, "prefix:doc"),))),
    "overtaken and stored": ("I4", history(ask(1, 9, tier="llm"), computed={1: (2, 8)}, forgot=(forgot(4, 6),))),
    "an older answer after a newer one": (
        "I7",
        history(ask(3, 4, epoch="3-0", tier="llm"), ask(5, 6), computed={1: (1, 2)}),
    ),
}


@pytest.mark.parametrize("case", FINE)
def test_what_may_happen_is_not_held_against_anybody(case: str) -> None:
    assert FINE[case].violations() == []


@pytest.mark.parametrize("case", WRONG)
def test_what_must_not_happen_is_found(case: str) -> None:
    words, seen = WRONG[case]
    assert [problem for problem in seen.violations() if words in problem]
