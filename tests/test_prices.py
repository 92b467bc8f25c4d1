"""What a call costs: a deployment's own prices first, then list prices, never a guess."""

from __future__ import annotations

import pytest

from producers.replay import report
from producers.replay.record import Recorder
from shared.errors import ConfigError
from shared.prices import cost
from shared.settings import Price, load
from tests.test_replay import SETUP, SIMULATED


def test_a_price_of_ones_own_comes_before_the_list_price() -> None:
    own = {"gpt-4o-mini": Price(input=1.0, output=2.0)}
    assert cost("gpt-4o-mini", 1_000_000, 500_000, own) == pytest.approx(2.0)
    assert cost("gpt-4o-mini", 1_000_000, 1_000_000) == pytest.approx(0.75)
    assert cost("text-embedding-3-small", 1_000_000, 0, own) == pytest.approx(0.02)


def test_a_model_nobody_lists_has_the_price_one_gives_it_and_a_free_one_costs_nothing() -> None:
    assert cost("ours", 10, 10) is None
    assert cost("ours", 3_000_000, 1_000_000, {"ours": Price(input=0.5)}) == pytest.approx(1.5)
    assert cost("ours", 10, 10, {"ours": Price(input=0.0)}) == 0.0


def test_prices_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_PRICES", '{"org/ours:7b": {"input": 0.1, "output": 0.4}}')
    assert cost("org/ours:7b", 1_000_000, 1_000_000, load().prices) == pytest.approx(0.5)
    monkeypatch.setenv("MILLPOND_PRICES", '{"ours": {"input": -1}}')
    with pytest.raises(ConfigError, match=r"prices\.ours\.input"):
        load()


def test_a_replay_counts_in_the_deployments_own_prices() -> None:
    recorder = Recorder()
    recorder.spent["ours", 1_000_000, 0] += 1
    recorder.saved["ours", 1_000_000, 0] += 3
    found = report.build(recorder, SETUP, SIMULATED, {"ours": Price(input=2.0)})
    assert (found.spent.dollars, found.saved.dollars, found.spent.unpriced) == (2.0, 6.0, 0)
