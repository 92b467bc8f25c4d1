"""The report: known rows in, exact figures out; the page needs nobody else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import asyncpg
import pytest
from rich.console import Console

from shared.settings import Experiment
from shared.touches import BOUNDS
from tests.databases import Database
from workers import report_html, report_table
from workers.report import Report, Window, asked, collect
from workers.report_sql import BYS

NOW = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
HOUR = datetime(2026, 11, 20, 10, tzinfo=UTC)
WINDOW = Window(HOUR, HOUR + timedelta(hours=1))


def histogram(**counts: int) -> list[int]:
    """Latencies by the upper bound of their bucket: `histogram(to_5=3)` are three from 4 to 5 ms."""
    return [counts.get(f"to_{bound}", 0) for bound in (*BOUNDS, "inf")]


class History:
    """Rows written as the persistence worker writes them."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self._calls = 0

    async def hits(
        self,
        tier: str,
        hits: int,
        *,
        at: datetime = HOUR,
        cost: float = 0.0,
        tokens: tuple[int, int] = (0, 0),
        saved_ms: int = 0,
        latency: list[int] | None = None,
        model: str = "m",
        tenant: str = "t",
        experiment: tuple[str, str] = ("", ""),
    ) -> None:
        """Count `hits` of one tier."""
        row = at, tier, "p", tenant, model, *experiment, hits, *tokens, cost, saved_ms, latency or histogram(to_5=hits)
        await self.connection.copy_records_to_table("hits", records=[row])

    async def calls(
        self,
        *costs: float | None,
        at: datetime = HOUR,
        tokens: tuple[int, int] = (100, 50),
        kind: str = "fill",
        outcome: str = "stored",
        model: str = "m",
        tenant: str = "t",
        experiment: tuple[str | None, str | None] = (None, None),
        provider: str = "openai",
    ) -> None:
        """Record a provider call of each cost."""
        columns = (
            "at", "partition", "id", "profile", "tenant", "model", "provider", "kind", "outcome", "prompt_tokens",
            "completion_tokens", "cost", "experiment", "variant",
        )  # fmt: skip
        rows = []
        for cost in costs:
            self._calls += 1
            rows.append(
                (at, 0, f"{self._calls}-0", "p", tenant, model, provider, kind, outcome, *tokens, cost, *experiment)
            )
        await self.connection.copy_records_to_table("calls", records=rows, columns=columns)

    async def key(self, key: bytes, hits: int, *, at: datetime = HOUR, cost: float = 0.0, prompt: Any = None) -> None:
        """Record a popular key and its answer."""
        await self.connection.execute("INSERT INTO top_keys VALUES ($1, $2, $3)", at, key, hits)
        await self.connection.execute(
            "INSERT INTO answers (key, partition, epoch_ms, epoch_seq, created, fresh, expires, gone, tags, profile,"
            " tenant, model, cost, bytes, entry, prompt)"
            " VALUES ($1, 0, 0, 0, $2, $2, $2, $2, '{}', 'p', 't', 'm', $3, 0, '', $4::text::jsonb)"
            " ON CONFLICT DO NOTHING",
            key, at, cost, None if prompt is None else json.dumps(prompt),
        )  # fmt: skip

    async def report(self, window: Window = WINDOW, **options: Any) -> Report:
        """Read the report of the window, by every dimension."""
        return await collect(self.connection, window, BYS, options.pop("top", 10), **options)


@pytest.fixture
async def history(database: Database) -> AsyncIterator[History]:
    connection = await database.connect()
    yield History(connection)
    await connection.close()


@pytest.fixture
async def busy(history: History) -> History:
    """An hour with every kind of figure in it."""
    await history.hits("l1", 50, cost=5.0, tokens=(5000, 500), saved_ms=50_000, latency=histogram(to_1=50))
    await history.hits("l3", 10, cost=1.0, tokens=(1000, 100), saved_ms=10_000, latency=histogram(to_10=10))
    await history.hits("collapsed", 20, cost=2.0, tokens=(2000, 200), latency=histogram(to_2000=20))
    # A row of the tier `llm` carries no savings; if it did, they would still not be counted.
    await history.hits("llm", 20, cost=99.0, tokens=(9, 9), latency=histogram(to_2000=10, to_5000=10))
    await history.calls(*[0.1] * 20)
    await history.calls(0.5, kind="refresh")
    await history.calls(None, outcome="provider_timeout", tokens=(0, 0))
    await history.calls(None, model="unlisted", provider="simulated")
    return history


# figures


async def test_every_figure_of_the_whole(busy: History) -> None:
    total = (await busy.report()).total
    assert (total.requests, total.hits, total.coalesced, total.computed) == (100, 60, 20, 20)
    assert (total.calls, total.failed_calls, total.background_calls, total.unpriced_calls) == (23, 1, 1, 1)
    assert (total.spent_prompt_tokens, total.spent_completion_tokens) == (2200, 1100)
    assert (total.saved_prompt_tokens, total.saved_completion_tokens) == (8000, 800)
    assert (total.spent, total.overhead, total.saved, total.saved_coalesced) == pytest.approx((2.5, 0.5, 8.0, 2.0))
    assert (total.hit_rate, total.without_call_rate, total.saved_seconds) == pytest.approx((0.6, 0.8, 60.0))
    assert total.coalescing_factor == pytest.approx(2.0)
    assert total.requests_per_call == pytest.approx(100 / 23)
    # Without a cache nobody would refresh: 2.0 for the calls requests waited for, 8.0 for those they were spared.
    assert total.without_cache == pytest.approx(10.0)
    assert total.saved_share == pytest.approx(0.75)
    assert total.p50_ms == pytest.approx(1.0)
    assert total.p95_ms == pytest.approx(4500.0)


async def test_calls_of_simulated_providers_are_told_by_what_they_are(history: History) -> None:
    for provider in ("simulated", "simulated:m", "simulated/cheap:m"):
        await history.calls(0.1, provider=provider)
    for provider in ("openai", "simulated-not:m", "cheap:simulated"):
        await history.calls(0.1, provider=provider)
    assert (await history.report()).total.simulated_calls == 3


async def test_hits_on_what_was_made_up_are_told_though_nothing_was_called(history: History) -> None:
    await history.hits("l1", 5, cost=1.0)
    await history.key(b"k" * 16, 5, cost=0.2)
    assert not any("no money" in note for note in report_table.notes(await history.report()))
    await history.connection.execute("UPDATE answers SET provider = 'simulated/cheap'")
    assert any("1 of the top keys" in note for note in report_table.notes(await history.report()))


async def test_each_tier_has_its_share_its_latency_and_its_savings(busy: History) -> None:
    tiers = {tier.tier: tier for tier in (await busy.report()).tiers}
    assert list(tiers) == ["l1", "l3", "collapsed", "llm"]
    assert [(tier.requests, tier.share) for tier in tiers.values()] == [(50, 0.5), (10, 0.1), (20, 0.2), (20, 0.2)]
    assert [tier.saved for tier in tiers.values()] == pytest.approx([5.0, 1.0, 2.0, 0.0])
    assert (tiers["l3"].p50_ms, tiers["l3"].p95_ms) == pytest.approx((9.0, 9.9))
    assert (tiers["llm"].p50_ms, tiers["llm"].p95_ms) == pytest.approx((2000.0, 4900.0))


async def test_every_dimension_adds_up_to_the_whole(busy: History) -> None:
    await busy.hits("l2", 7, model="other", tenant="u", cost=0.7)
    await busy.calls(0.3, model="only paid for")
    report = await busy.report()
    for by in set(BYS) - {"experiment"}:
        lines = report.groups[by]
        assert sum(line.requests for line in lines) == report.total.requests == 107
        assert sum(line.calls for line in lines) == report.total.calls
        assert sum(line.spent for line in lines) == pytest.approx(report.total.spent)
        assert sum(line.saved for line in lines) == pytest.approx(report.total.saved)
    assert [line.name for line in report.groups["hour"]] == ["2026-11-20 10:00"]
    assert {line.name for line in report.groups["model"]} == {"m", "other", "unlisted", "only paid for"}
    assert [line.name for line in report.groups["tier"]] == ["l1", "l2", "l3", "collapsed", "llm"]


async def test_only_the_hours_asked_for_count(history: History) -> None:
    for hours in (-1, 0, 1):
        await history.hits("l1", 10 + hours, at=HOUR + timedelta(hours=hours))
        await history.calls(1.0, at=HOUR + timedelta(hours=hours, minutes=59))
    report = await history.report()
    assert (report.total.requests, report.total.calls) == (10, 1)
    assert report.first_hour == HOUR - timedelta(hours=1)


async def test_tables_show_the_costliest_lines_and_all_of_time(history: History) -> None:
    for n in range(5):
        await history.hits("l1", 1, at=HOUR - timedelta(days=n), tenant=f"tenant-{n}", cost=float(n))
    report = await history.report(Window(HOUR - timedelta(days=7), NOW), top=2)
    assert [line.name for line in report.groups["tenant"]] == ["tenant-4", "tenant-3"]
    assert [line.name for line in report.groups["day"]] == [f"2026-11-{day}" for day in range(16, 21)]


async def test_no_figure_is_cropped_on_a_narrow_terminal(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    slow = histogram(to_400=1_234_567)
    await history.hits("l3", 1_234_567, cost=3.3e-8, model="a-model-with-a-long-name", latency=slow)
    report = await history.report()
    console = report_table.console(report, ["model"])
    with console.capture() as shown:
        console.print(report_table.render(report, ["model"]))
    (row,) = (line for line in shown.get().splitlines() if line.strip().startswith("a-model-with-a-long-name"))
    assert row.split()[1:] == ["1,234,567", "100.0%", "0", "$0.00", "$0.000000033", "350", "ms", "395", "ms"]


async def test_nothing_happened_is_a_report_too(history: History) -> None:
    report = await history.report()
    assert report.empty
    assert (report.total.requests, report.total.saved_share, report.total.p50_ms) == (0, 0.0, None)
    assert "No request was answered" in report_html.render(report)
    json.dumps(report.as_dict())


async def test_top_keys_name_what_was_asked_if_it_was_kept(history: History) -> None:
    await history.key(b"k" * 16, 5, cost=0.2, prompt={"messages": [{"role": "user", "content": "How deep\nis it?"}]})
    await history.key(b"k" * 16, 2, at=HOUR - timedelta(hours=1), cost=0.2)
    await history.key(b"l" * 16, 6)
    await history.connection.execute("INSERT INTO top_keys VALUES ($1, $2, 1)", HOUR, b"gone" * 4)
    first, second, third = (await history.report(Window(HOUR - timedelta(hours=1), NOW))).top
    assert (first.key, first.hits, first.prompt) == ((b"k" * 16).hex(), 7, "How deep is it?")
    assert first.saved == pytest.approx(1.4)
    assert (second.hits, second.prompt) == (6, None)
    assert (third.hits, third.model, third.saved) == (1, None, None)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"input": "plain"}, "plain"),
        ({"input": ["one", "two"]}, "one two"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}]}, "in parts"),
        ({"messages": [{"role": "system", "content": "only"}]}, None),
        ({"input": "x" * 500}, "x" * 199 + "…"),
        ({}, None),
        ([], None),
    ],
)
def test_what_a_body_asks_on_one_line(body: Any, text: str | None) -> None:
    assert asked(body) == text


# experiments


async def test_variants_are_compared_with_the_first_declared(history: History) -> None:
    for variant, hits, computed in (("old", 600, 400), ("new", 700, 300)):
        await history.hits("l1", hits, experiment=("prompt", variant))
        await history.hits("llm", computed, experiment=("prompt", variant))
        await history.calls(*[0.01] * computed, experiment=("prompt", variant))
    await history.hits("l1", 5)  # of no experiment
    declared = {"prompt": Experiment(variants={"old": 1, "new": 1})}
    base, other = (await history.report(experiments=declared)).variants
    assert (base.variant, base.baseline, base.hit_rate, base.hit_rate_difference) == ("old", True, 0.6, None)
    assert (other.variant, other.requests, other.calls) == ("new", 1000, 300)
    assert (base.cost_per_request, other.cost_per_request) == pytest.approx((0.004, 0.003))
    rate, cost = other.hit_rate_difference, other.cost_difference
    assert rate is not None
    assert (rate.estimate, rate.low, rate.high) == pytest.approx((0.1, 0.0583, 0.1412), abs=1e-3)
    assert cost is not None
    assert cost.estimate == pytest.approx(-0.001)
    assert cost.clear


async def test_requests_that_hit_by_the_hour_have_a_wider_interval(history: History) -> None:
    for n in range(12):
        for variant in ("a", "b"):
            hits = 100 if (n % 2 == 0) == (variant == "a") else 20
            at = HOUR - timedelta(hours=n)
            await history.hits("l1", hits, at=at, experiment=("e", variant))
            await history.hits("llm", 101 - hits, at=at, experiment=("e", variant))
            await history.calls(*[0.01] * (101 - hits), at=at, experiment=("e", variant))
    _, other = (await history.report(Window(HOUR - timedelta(hours=11), NOW))).variants
    rate, cost = other.hit_rate_difference, other.cost_difference
    assert rate is not None
    assert rate.high is not None
    assert (rate.estimate, rate.clear) == (0.0, False)
    # An hour is 40 points off the mean: each variant's error is that over the root of eleven, times Student's t.
    assert rate.high == pytest.approx(2.201 * 2**0.5 * (40 / 101) / 11**0.5, abs=1e-3)
    assert cost is not None
    assert cost.high is not None
    assert cost.high == pytest.approx(0.01 * rate.high, rel=1e-3)


async def test_a_variant_that_one_only_paid_for_is_no_baseline(history: History) -> None:
    await history.calls(0.1, experiment=("e", "a"))
    await history.hits("l1", 5, experiment=("e", "b"))
    variants = (await history.report()).variants
    assert [(v.variant, v.baseline, v.requests) for v in variants] == [("a", False, 0), ("b", True, 5)]
    await history.calls(0.1, experiment=("only paid for", "a"))
    report = await history.report()
    assert not any(variant.baseline for variant in report.variants if variant.experiment == "only paid for")
    assert "only paid for" in report_html.render(report)


# the page


class _Outside(HTMLParser):
    """Collects what a page would run or ask others for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form"):
            self.found.append(tag)
        self.found += [name for name, _ in attrs if name in ("src", "href", "srcset", "data") or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_page_is_self_contained_and_repeats_nobodys_markup(busy: History) -> None:
    evil = "<script>alert(1)</script>"
    await busy.hits("l2", 3, tenant=evil, model='"><img/src=x>', experiment=(evil, "a"))
    await busy.key(b"k" * 16, 9, prompt={"input": evil})
    page = report_html.render(await busy.report())
    read = _Outside()
    read.feed(page)
    assert read.found == []
    assert "url(" not in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert evil in read.text
    for figure in ("$8.00", "$2.50", "103", "L3, PostgreSQL", "simulated provider"):
        assert figure in read.text


# the tables


async def test_the_tables_fit_a_terminal_of_eighty_columns(busy: History) -> None:
    for variant, hits in (("control", 600), ("short", 700)):
        await busy.hits("l1", hits, model="text-embedding", experiment=("shorter-prompt", variant))
        await busy.calls(*[0.01] * 40, experiment=("shorter-prompt", variant))
    written = StringIO()
    Console(file=written, width=80).print(report_table.render(await busy.report(), BYS))
    text = written.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("text-embedding", "L3, PostgreSQL", "2026-11-20 10:00", "-$0.0", " pp", "requests per computation"):
        assert words in text
