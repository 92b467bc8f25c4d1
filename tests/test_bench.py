"""Every benchmark, small, on a throwaway server: what it reports, what it leaves. Nothing here asserts a speed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from producers.bench import command, machine, measure, promotion, questions, scenarios, table, workflows
from producers.bench.stage import surroundings
from shared.console import INTERRUPTED
from shared.errors import ConfigError, InvalidRequest, Unavailable
from shared.loop import run_fast
from tests.command_line import await_that
from tests.conftest import Server

FRONT_DOOR = Path(command.__file__).parents[2] / "millpond.py"

SMALL: dict[str, dict[str, Any]] = {
    "hits": {"rounds": 2, "seconds": 0.1, "concurrency": 8, "distinct": 10},
    "latency": {"rounds": 2, "count": 10, "distinct": 5},
    "miss": {"rounds": 2, "count": 5, "together": 4, "count_together": 8},
    "stampede": {"rounds": 1, "requests": 200, "producers": 2},
    "failover": {"rounds": 1, "requests": 200, "producers": 2},
    "memory": {"answers": 1000, "compared": 20},
    "promotion": {"requests": 300, "seconds": 3.0, "answers": 100},
    "l3": {"stored": 3000, "askable": 90, "asked": 20},
    "scenarios": {
        "conversations": 12,
        "at_once": 4,
        "samples": 10,
        "seconds": 0.3,
        "burst_requests": 60,
        "users_requests": 150,
        "misses": 5,
        "answers": 60,
    },
}
PROMISED = {
    "hits": {"millpond_per_s", "get_per_s", "echo_per_s", "ratio_to_get", "ratio_to_echo"},
    "latency": {"millpond_p50_ms", "get_p50_ms", "ratio"},
    "miss": {"added_p50_ms", "added_p95_ms"},
    "stampede": {"requests", "answered", "provider_calls"},
    "failover": {"requests", "answered", "provider_calls"},
    "memory": {"answers", "text_bytes", "redis_bytes_per_answer"},
    "promotion": {"requests", "distinct", "l2_memory_share", "all_hits_share", "answers", "answers_mb"},
    "l3": {"stored", "hit_p50_ms", "hit_p95_ms"},
}


def small(name: str, url: str | None = None) -> dict[str, Any]:
    """Run one benchmark in its small size."""
    steps: list[float] = []
    with surroundings(url) as stage:
        run = import_module(f"producers.bench.{name}").run
        found: dict[str, Any] = run_fast(run(stage, lambda _, fraction: steps.append(fraction), **SMALL[name]))
    assert steps == sorted(steps)
    assert steps[-1] <= 1
    return found


@pytest.mark.parametrize("name", ["hits", "latency", "memory"])
def test_a_benchmark_reports_the_fields_it_promises(name: str) -> None:
    found = small(name)
    assert PROMISED[name] <= found.keys()
    assert all(found[field] > 0 for field in PROMISED[name])
    assert orjson.loads(orjson.dumps(found)) == found


def test_the_scenarios_report_claim_measured_and_ratio() -> None:
    found = small("scenarios")
    leads, same, users = found["leads"], found["same_questions"], found["users"]
    # Counted by the provider and by the client alike: each distinct request is computed once, whoever asks.
    shared = len(workflows.SHARED_BY_ALL) + workflows.PROPERTIES * len(workflows.SHARED_BY_PROPERTY)
    assert leads["provider_calls"] == leads["answered_from"]["llm"] == shared + 12 * len(workflows.OWN)
    assert 85_000 < leads["tokens_without"] < 101_000
    assert leads["tokens_with"] < leads["tokens_without"]
    assert (same["provider_calls"], same["answered_from"]["llm"]) == (5, 5)
    assert sum(same["answered_from"].values()) == 60
    assert sum(users["answered_from"].values()) == 150
    assert all(claim["ratio"] == round(claim["measured"] / claim["claim"], 4) for claim in found["claims"])
    assert found["due"] == sum(claim["due"] for claim in found["claims"]) == len(found["claims"]) - 1
    shown = Console(width=140, record=True, file=io.StringIO())
    found |= {"cpu_busy_before": 0.0, "server": {"server": "x", "connection": "unix"}}
    shown.print(table.render({"scenarios": found}, machine.describe()))
    text = shown.export_text()
    assert "tokens per workflow" in text
    assert "needs the semantic tier" in text or found["claims"][-4]["kept"]


def test_a_claim_that_is_not_kept_is_a_figure_below_its_floor() -> None:
    claims = [scenarios.Claim("a", "b", "c", 10, measured, unit="ms", due=due).as_dict()
              for measured, due in ((9, True), (11, True), (11, False))]  # fmt: skip
    found = table.figures({"scenarios": {"claims": claims}})
    assert [figure.verdict for figure in found] == [table.AIM, table.MISSED]


def test_hits_are_answered_without_a_provider_call() -> None:
    assert small("hits")["provider_calls_meanwhile"] == 0


def test_what_only_postgresql_has_is_answered_from_there() -> None:
    found = small("l3")
    assert PROMISED["l3"] <= found.keys()
    assert (found["stored"], found["not_hits"], found["hits"]) == (3000, 0, 48)


def test_what_a_miss_adds_is_less_than_what_it_takes() -> None:
    found = small("miss")
    assert PROMISED["miss"] <= found.keys()
    assert found["provider_p50_ms"] >= 20
    assert found["provider_calls"] == found["requests"] == 20 + 2 * (5 + 8)


def test_a_stampede_is_answered_by_one_call() -> None:
    found = small("stampede")
    assert (found["requests"], found["answered"], found["provider_calls"]) == (200, 200, 1)
    assert found["joined"] == 199


def test_the_leaders_death_costs_one_call_more_and_no_answer() -> None:
    found = small("failover")
    assert (found["requests"], found["answered"], found["provider_calls"]) == (200, 200, 2)
    assert found["aboard_at_death"] >= 190


def test_probation_takes_less_of_redis_and_both_streams_are_the_same() -> None:
    found = small("promotion")
    assert PROMISED["promotion"] <= found.keys()
    assert 0 < found["l2_memory_share"] < 1
    assert found["without_probation"]["l2_end_entries"] == found["distinct"] > found["with_probation"]["l2_end_entries"]
    assert orjson.loads(orjson.dumps(found)) == found


def test_a_sample_of_a_stream_has_all_requests_of_the_keys_it_has() -> None:
    stream = promotion.synthetic(5000)
    some = promotion.sampled(stream, 1000)
    chosen = {name for _, name in some}
    assert some == [one for one in stream if one[1] in chosen]
    assert 300 < len(some) < 3000


def test_a_trace_is_read_in_order_of_time_and_what_is_none_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("ts_s,key\n30,c\n10,a\n20,b\n")
    assert promotion.read_trace(trace) == [(0.0, "a"), (0.5, "b"), (1.0, "c")]
    for text in ("", "ts_s\n1\n", "ts_s,key\nsoon,a\n"):
        trace.write_text(text)
        with pytest.raises(InvalidRequest, match=r"column `key`|no rows"):
            promotion.read_trace(trace)


def test_the_command_refuses_a_trace_where_it_means_nothing(tmp_path: Path) -> None:
    with command_line("latency", "--trace", "x.csv", cwd=tmp_path) as process:
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, b"--trace is for" in errors) == (2, True)


def test_a_configured_server_is_left_empty(server: Server) -> None:
    small("latency", server.url)
    with server.connect() as connection:
        assert connection.dbsize() == 0


def test_a_configured_server_that_is_in_use_is_not_touched(server: Server) -> None:
    with server.connect() as connection:
        connection.set("somebody's", "data", px=60_000)
        with pytest.raises(ConfigError, match="wants an empty one"), surroundings(server.url):
            pass
        assert connection.get("somebody's") == b"data"


def test_settings_that_lie_about_do_not_reach_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLPOND_PARTITIONS", "7")
    (tmp_path / ".env").write_text("MILLPOND_MODEL=another\n")
    with surroundings(None) as stage:
        assert (stage.settings().partitions, stage.settings().model) == (1, "gpt-4o-mini")
    assert os.environ["MILLPOND_PARTITIONS"] == "7"
    assert Path.cwd() == tmp_path


def test_a_child_that_dies_is_named_with_its_last_words() -> None:
    with surroundings(None) as stage, pytest.raises(Unavailable, match=r"llm worker.*MILLPOND_CONCURRENCY"):
        run_fast(stage.worker("llm", concurrency=0))


def test_questions_are_all_different_however_many() -> None:
    asked = questions.distinct(5000)
    assert len({orjson.dumps(messages) for messages in asked}) == 5000


def test_every_contender_has_its_turn_at_being_first() -> None:
    names = ("a", "b", "c")
    assert [measure.turns(names, number)[0] for number in range(4)] == ["a", "b", "c", "a"]


def test_a_ratio_is_taken_within_each_round() -> None:
    rounds = [{"us": 10.0, "them": 5.0}, {"us": 1.0, "them": 1.0}, {"us": 9.0, "them": 3.0}]
    assert measure.ratios(rounds, "us", "them") == {"median": 2.0, "min": 1.0, "max": 3.0}


@pytest.mark.parametrize(
    ("measured", "less", "verdict"),
    [
        (4, True, table.AIM), (5, True, table.FLOOR), (6.1, True, table.MISSED),
        (6, False, table.AIM), (4, False, table.FLOOR), (3.9, False, table.MISSED),
    ],
)  # fmt: skip
def test_a_verdict_names_the_best_bound_that_holds(measured: float, less: bool, verdict: str) -> None:
    floor, aim = (6, 4) if less else (4, 6)
    assert table.Promise("it", "hits", "field", floor, aim, less=less).verdict(measured) == verdict


def test_the_table_shows_every_promise_with_its_verdict() -> None:
    results: dict[str, dict[str, Any]] = {
        name: {"cpu_busy_before": 0.5, "server": {"server": "valkey 9", "connection": "unix"}} for name in PROMISED
    }
    for promise in table.PROMISES:
        results[promise.benchmark][promise.field] = promise.aim
    screen = Console(width=120, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    with screen.file:
        screen.print(table.render(results, machine.describe()))
        shown = screen.export_text()
    assert shown.count(table.AIM) == len(table.PROMISES)
    assert "50% busy" in shown


def command_line(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, FRONT_DOOR, "bench", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_the_command_prints_one_json_object_and_writes_its_report(tmp_path: Path) -> None:
    with command_line("latency", "--json", "--out", "new/report.json", cwd=tmp_path) as process:
        out, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 1), errors  # 1: this machine is slow today
    printed, report = orjson.loads(out), orjson.loads((tmp_path / "new" / "report.json").read_bytes())
    assert printed["benchmark"] == "latency"
    assert {"date", "machine", "versions", "figures", "benchmarks"} <= report.keys()
    assert report["figures"][0]["measured"] == printed["ratio"]


def test_the_command_refuses_a_configured_server_that_is_not_configured(tmp_path: Path) -> None:
    with command_line("latency", "--configured", cwd=tmp_path) as process:
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, b"set MILLPOND_REDIS_URL" in errors) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_no_process_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with command_line("stampede", cwd=tmp_path) as process:
        await_that(lambda: len(_children(process.pid)) >= 6)
        children = _children(process.pid)
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert list(tmp_path.iterdir()) == []
    await_that(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
