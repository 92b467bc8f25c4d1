"""The `report` command: its window, its output, what it says when there is nothing to read from."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.rounding import rounded
from tests import test_report
from tests.command_line import run, run_json
from tests.databases import Database
from tests.test_report import HOUR, NOW, History
from workers.report import Window

history = test_report.history


def test_whole_hours_of_the_window() -> None:
    assert Window.of("2h", None, NOW) == Window(HOUR, HOUR + timedelta(hours=3))
    assert Window.of("2026-11-19", "2026-11-20", NOW).until == datetime(2026, 11, 20, tzinfo=UTC)
    assert Window.of("2026-11-20T10:30+01:00", None, NOW).since == HOUR - timedelta(hours=1)
    for since, until in (("yesterday", None), ("2026-13-01", None), ("1d", "2d")):
        with pytest.raises(InvalidRequest):
            Window.of(since, until, NOW)


def test_the_command_shows_writes_and_prints(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLPOND_DATABASE_URL", database.url)
    found = run_json("report", "--since", "24h", "--by", "model", "--html", str(tmp_path / "page.html"))
    assert (found["total"]["requests"], found["html"]) == (0, str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "No request" in run("report").stdout
    assert run_json("report", "--html", str(tmp_path / "no" / "page.html"), status=2)["error"]["field"] == "html"
    assert run_json("report", "--by", "weekday", status=2)["error"]["field"] == "by"
    assert run_json("report", "--since", "soon", status=2)["error"]["field"] == "since"


async def test_figures_are_printed_without_the_noise_of_sums_and_small_ones_stay(
    history: History, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    await history.calls(0.1, 0.2, at=now)
    await history.calls(4e-8, 3e-8, at=now, tenant="tiny", experiment=("e", "a"))
    await history.hits("l1", 3, at=now.replace(minute=0, second=0, microsecond=0), cost=0.1 + 0.2 + 1e-17)
    monkeypatch.setenv("MILLPOND_DATABASE_URL", database.url)
    done = await asyncio.to_thread(run, "report", "--by", "tenant", "--by", "experiment", "--json")
    found = json.loads(done.stdout)
    assert [line["spent"] for line in found["groups"]["tenant"]] == [0.3, 7e-8]
    assert (found["total"]["saved"], found["tiers"][0]["saved"]) == (0.3, 0.3)
    digits = max(len(number.partition(".")[2]) for number in re.findall(r"\b\d+\.\d+\b", done.stdout))
    assert digits <= 8, done.stdout


@pytest.mark.parametrize(
    ("exact", "printed"),
    [
        ({"spent": 0.1 + 0.2}, 0.3), ({"spent": 1234.5678901}, 1234.56789), ({"saved": 1.23456789e-9}, 1.23457e-9),
        ({"saved": -4e-8}, -4e-8), ({"saved": 0.0}, 0.0), ({"hit_rate": 2 / 3}, 0.6667), ({"p50_ms": 1 / 3}, 0.333),
        ({"saved_seconds": 1.0005}, 1.0), ({"cost_difference": {"low": 1.23456789e-7}}, {"low": 1.23457e-7}),
        ({"hit_rate_difference": {"high": 1 / 3}}, {"high": 0.3333}), ({"rows": [1, None, "x"]}, [1, None, "x"]),
    ],
)  # fmt: skip
def test_a_figure_is_rounded_by_its_unit(exact: dict[str, Any], printed: Any) -> None:
    assert list(rounded(exact).values()) == [printed]


def test_without_a_database_it_says_what_to_do(empty_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MILLPOND_DATABASE_URL" in run_json("report", status=3)["error"]["message"]
    monkeypatch.setenv("MILLPOND_DATABASE_URL", empty_database.url)
    assert "millpond migrate" in run_json("report", status=3)["error"]["message"]


def test_a_database_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLPOND_DATABASE_URL", f"postgresql:///x?host={tmp_path}&user=x")
    assert run_json("report", status=3)["error"]["code"] == "unavailable"
