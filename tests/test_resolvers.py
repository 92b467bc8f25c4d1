"""Registered resolvers: a function of the application's, run by the LLM pool for a miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import ConfigError, ProviderError, ProviderTimeout, RateLimited
from shared.providers.resolver import load_resolver
from tests import faults_support
from tests.faults_support import Pond
from tests.resolvers_support import ANSWERS

pond = faults_support.pond

HERE = "tests.resolvers_support"


def resolved_by(pond: Pond, function: str, **other: Any) -> None:
    pond.options |= {"profiles": {"mine": {"resolver": f"{HERE}:{function}", "negative_ttl": 0.0}}, **other}


@pytest.mark.parametrize("function", ["plain", "waiting"])
async def test_a_resolver_answers_a_miss_with_any_value(pond: Pond, function: str) -> None:
    resolved_by(pond, function)
    async with pond.working("lookup", "llm"), pond.client() as client:
        for asked in ("json", "text", "bytes", "nothing", "array"):
            first = await client.ask(input=asked, profile="mine")
            again = await client.ask(input=asked, profile="mine")
            assert (first.tier, first.stored, first.provider) == ("llm", True, f"resolver:{HERE}:{function}")
            assert again.tier in ("l1", "l2")
            for reply in (first, again):
                assert np.array_equal(reply.value, ANSWERS[asked]), asked
                assert type(reply.value) is type(ANSWERS[asked])
        array = (await client.ask(input="array", profile="mine")).value
    assert (array.dtype.str, array.shape) == (">f8", (2, 3))
    assert pond.calls() == 0


async def test_what_a_resolver_raises_reaches_who_asked(pond: Pond) -> None:
    resolved_by(pond, "waiting")
    async with pond.working("lookup", "llm"), pond.client() as client:
        with pytest.raises(ProviderError, match="raised LookupError: no such thing") as plain:
            await client.ask(input="fail", profile="mine")
        with pytest.raises(RateLimited) as typed:
            await client.ask(input="busy", profile="mine")
        with pytest.raises(ProviderError, match="neither JSON, bytes nor an array"):
            await client.ask(input="object", profile="mine")
        for odd in ("objects", "long doubles"):  # what no client could read
            with pytest.raises(ProviderError, match="cannot be stored"):
                await client.ask(input=odd, profile="mine")
        await pond.settled()
    assert plain.value.provider == typed.value.provider == f"resolver:{HERE}:waiting"
    assert not pond.found("{mp:*}:entry:*")


async def test_a_resolver_that_never_answers_is_cut(pond: Pond) -> None:
    resolved_by(pond, "hanging", total_timeout=0.2, attempt_timeout=0.2)
    async with pond.working("lookup", "llm"), pond.client() as client:
        with pytest.raises(ProviderTimeout, match=r"within 0\.2 s"):
            await client.ask(input="json", profile="mine")


async def test_a_worker_whose_resolver_cannot_be_imported_does_not_start(pond: Pond) -> None:
    resolved_by(pond, "nobody")
    with pytest.raises(ConfigError, match="has no attribute 'nobody'") as refusal:
        async with pond.working("llm"):
            pass
    assert refusal.value.field == "profiles.mine.resolver"


def test_a_resolver_is_found_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["/nowhere"])
    (tmp_path / "my_own_resolvers.py").write_text("class Mine:\n    @staticmethod\n    def one(body): return 1\n")
    assert load_resolver("my_own_resolvers:Mine.one", "mine")({}) == 1
