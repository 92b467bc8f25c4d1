"""Experiments: who gets which variant, what a request must say for it, and that the key knows nothing of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, InvalidRequest
from shared.experiments import assign
from shared.messages import Question, Rules, understand
from shared.settings import Experiment, load

EVEN = {"a": 1.0, "b": 1.0}
GREETING = {"greeting": Experiment(variants=EVEN), "by-team": Experiment(variants={"x": 1}, unit="team")}


def ask(body: dict[str, Any] | None = None, **cache: Any) -> Question:
    rules = dataclasses.replace(Rules.of(load()), experiments=GREETING)
    return understand(orjson.dumps({"input": "hi"} | (body or {})), orjson.dumps(cache), rules)


def test_the_example_of_the_protocols_page_holds() -> None:
    assert [assign("greeting", unit, EVEN) for unit in ("u1", "u5")] == ["b", "a"]


def test_variants_are_drawn_by_their_weights() -> None:
    drawn = Counter(assign("greeting", f"user-{n}", {"a": 1, "b": 3, "none": 0}) for n in range(20_000))
    assert set(drawn) == {"a", "b"}
    assert drawn["a"] == pytest.approx(5_000, abs=250)  # four standard deviations


def test_another_experiment_draws_afresh() -> None:
    both = Counter((assign("one", f"u{n}", EVEN), assign("two", f"u{n}", EVEN)) for n in range(4_000))
    assert all(count == pytest.approx(1_000, abs=120) for count in both.values())
    assert len(both) == 4


@given(st.text(), st.dictionaries(st.text(min_size=1), st.floats(1e-6, 1e6), min_size=1, max_size=5))
def test_the_order_of_the_variants_means_nothing(unit: str, variants: dict[str, float]) -> None:
    try:
        (unit + "".join(variants)).encode()
    except UnicodeEncodeError:
        return
    found = assign("e", unit, variants)
    assert found in variants
    assert found == assign("e", unit, dict(reversed(variants.items())))


def test_a_variant_without_any_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        assign("e", "u", {"a": 0})


def test_a_request_that_names_no_variant_gets_its_units() -> None:
    assert ask(experiment="greeting", unit="u1").kind.variant == "b"
    assert ask({"user": "u5"}, experiment="greeting").kind.variant == "a"
    assert ask({"user": "u5"}, experiment="greeting", unit="u1").kind.variant == "b"
    assert ask({"team": 7}, experiment="by-team").kind.variant == "x"


def test_a_variant_given_is_taken_as_given() -> None:
    assert ask(experiment="greeting", variant="c", unit="u1").kind.variant == "c"
    assert ask(experiment="undeclared", variant="c").kind.variant == "c"
    assert ask(experiment="undeclared").kind.variant is None
    assert (ask().kind.experiment, ask().kind.variant) == (None, None)


def test_the_variant_is_not_part_of_the_key() -> None:
    assert len({ask(experiment="greeting", unit=unit).key for unit in ("u1", "u5")} | {ask().key}) == 1


@pytest.mark.parametrize(
    ("cache", "field"),
    [
        ({"variant": "a"}, "experiment"),
        ({"unit": "u1"}, "experiment"),
        ({"experiment": "undeclared", "unit": "u1"}, "experiment"),
        ({"experiment": "greeting"}, "unit"),
        ({"experiment": "greeting", "unit": ""}, "unit"),
        ({"experiment": "greeting", "unit": True}, "unit"),
        ({"experiment": "greeting", "unit": ["u1"]}, "unit"),
        ({"experiment": "two words", "variant": "a"}, "experiment"),
    ],
)
def test_what_cannot_be_assigned_is_refused_by_field(cache: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(**cache)
    assert refused.value.field == field


@pytest.mark.parametrize("experiment", [{"variants": {}}, {"variants": {"a": 0}}, {"variants": {"two words": 1}}])
def test_an_experiment_that_cannot_be_drawn_is_refused_at_start(experiment: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"experiments\.mine"):
        load(experiments={"mine": experiment})
