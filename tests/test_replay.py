"""The driver, the account it gives, and the demo from end to end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvloop
from rich.console import Console

from producers.replay import plot, progress, report, table
from producers.replay.record import Recorder
from producers.replay.run import Run
from producers.replay.workload import Request
from shared.errors import InvalidRequest, ProviderTimeout
from shared.prices import cost

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}
PRICED = ("gpt-4o-mini", 1000, 100)
SETUP = report.Setup("file.jsonl", "as fast as answered", "the moment of sending", None, 1.0, 0, False)
SIMULATED = report.Provider("simulated", True, 3, 0)


@dataclass
class Told:
    """An answer as a client would give it."""

    tier: str
    collapsed: bool = False
    model: str = "gpt-4o-mini"
    usage: dict[str, Any] = field(default_factory=lambda: dict(USAGE))
    body: dict[str, Any] = field(default_factory=lambda: {"model": "simulated/gpt-4o-mini"})


class Desk:
    """Answers after `seconds`, except what asks to fail; keeps how many it served at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.at_once = self.most = 0
        self.asked: list[dict[str, Any]] = []

    async def ask_body(self, body: dict[str, Any] | bytes, **directives: Any) -> Told:
        """Answer as `llm` does."""
        self.asked.append(directives)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(self.seconds)
        self.at_once -= 1
        if isinstance(body, dict) and body.get("input") == "fail":
            raise ProviderTimeout("too slow")
        return Told("llm")


def run(desk: Desk, requests: list[Request], schedule: list[float] | None = None, **options: Any) -> Recorder:
    return asyncio.run(Run(desk, requests, schedule, **options).complete())


def test_flat_out_keeps_exactly_so_many_requests_on_their_way() -> None:
    desk = Desk(0.01)
    recorder = run(desk, [Request({"input": "q"})] * 40, concurrency=8)
    assert (len(recorder), desk.most) == (40, 8)


def test_latency_counts_from_the_scheduled_arrival_not_from_the_sending() -> None:
    recorder = run(Desk(0.05), [Request({"input": "q"})] * 4, [0.0] * 4, concurrency=1)
    assert max(recorder.latency) >= 0.2
    assert max(recorder.lag) >= 0.15


def test_an_early_timer_never_makes_an_answer_look_faster_than_it_was() -> None:
    todo = Run(Desk(0.002), [Request({"input": "q"})] * 300, [n / 997 for n in range(300)])
    recorder = uvloop.run(todo.complete())
    assert min(recorder.latency) >= 0.001
    assert min(recorder.lag) >= 0.0


def test_requests_go_out_when_they_are_due_in_order_of_time() -> None:
    recorder = run(Desk(), [Request({"input": str(n)}) for n in range(3)], [0.1, 0.0, 0.05])
    assert list(recorder.due) == pytest.approx([0.0, 0.05, 0.1], abs=0.02)
    assert 0.1 <= recorder.wall < 0.5


def test_errors_are_counted_by_code_and_do_not_stop_the_run() -> None:
    recorder = run(Desk(), [Request({"input": text}) for text in ("a", "fail", "b", "fail")])
    assert recorder.errors == {"provider_timeout": 2}
    assert recorder.counts["llm"] == 2


def test_a_requests_own_profile_and_tenant_win_over_the_runs() -> None:
    desk = Desk()
    run(desk, [Request({}, profile="chat"), Request({}, tenant="t")], concurrency=1, profile="intent", tenant="all")
    assert [(d["profile"], d["tenant"]) for d in desk.asked] == [("chat", "all"), ("intent", "t")]


def test_an_interrupted_run_reports_what_was_done() -> None:
    async def interrupt() -> tuple[int, bool]:
        todo = Run(Desk(0.01), [Request({"input": "q"})] * 1000, concurrency=1)
        task = asyncio.create_task(todo.complete())
        await asyncio.sleep(0.1)
        task.cancel()
        return len(await task), todo.interrupted

    done, interrupted = asyncio.run(interrupt())
    assert 0 < done < 1000
    assert interrupted


def record(*answers: Told, wall: float = 2.0) -> Recorder:
    recorder = Recorder()
    for number, answer in enumerate(answers):
        recorder.answered(number / 10, (number + 1) / 1000, answer)
        recorder.lag.append(0.0)
    recorder.wall = wall
    return recorder


def test_only_the_one_who_began_a_call_paid_for_it() -> None:
    recorder = record(Told("llm"), Told("llm", collapsed=True), Told("l1"), Told("l2"))
    recorder.failed(0.5, 1.0, "overloaded")
    found = report.build(recorder, SETUP, SIMULATED)
    price = cost(*PRICED)
    assert price is not None
    assert (found.spent.calls, found.saved.calls) == (1, 3)
    assert found.spent.dollars == pytest.approx(price)
    assert found.dollars_without_cache == pytest.approx(4 * price)
    assert found.saved_share == 0.75
    assert (found.requests, found.answered, found.without_call) == (5, 4, 3)
    assert {way: figures.count for way, figures in found.tiers.items()} == {"l1": 1, "l2": 1, "llm": 1}
    assert (found.coalesced.count, found.errors) == (1, {"overloaded": 1})


def test_a_simulated_answer_is_known_by_its_body_and_priced_as_the_model_it_stands_in_for() -> None:
    recorder = record(Told("llm"), Told("llm", body={"model": "gpt-4o-mini"}), Told("l1"))
    assert recorder.simulated == 1
    assert report.build(recorder, SETUP, SIMULATED).spent.dollars == pytest.approx(2 * (cost(*PRICED) or 0))


def test_chat_and_embedding_models_have_list_prices() -> None:
    assert cost("gpt-4o-mini", 1_000_000, 1_000_000) == pytest.approx(0.75)
    assert cost("text-embedding-3-small", 1_000_000, 0) == pytest.approx(0.02)


def test_a_model_without_a_price_is_counted_as_such_not_guessed() -> None:
    assert cost("a-model-of-our-own", 10, 10) is None
    found = report.build(record(Told("llm", model="a-model-of-our-own")), SETUP, SIMULATED)
    assert (found.spent.dollars, found.spent.unpriced, found.saved_share) == (0.0, 1, 0.0)


def test_percentiles_are_exact() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert [report.percentile(ordered, q) for q in (0.5, 0.95, 0.99, 1.0)] == [50.0, 95.0, 99.0, 100.0]
    assert report.percentile([7.0], 0.01) == 7.0
    assert report.percentile([], 0.5) == 0.0


def test_an_empty_run_has_a_report_too(tmp_path: Path) -> None:
    found = report.build(Recorder(), SETUP, SIMULATED)
    assert (found.requests, found.saved_share, found.tiers["llm"].count) == (0, 0.0, 0)
    plot.draw(Recorder(), found, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_hundred_thousand_outcomes_are_added_up_in_a_second_or_two() -> None:
    answers = [Told("l1"), Told("llm"), Told("llm", collapsed=True), Told("l2")]
    recorder = record(*(answers[n % 4] for n in range(100_000)))
    began = time.process_time()
    assert report.build(recorder, SETUP, SIMULATED).requests == 100_000
    assert time.process_time() - began < 3


def test_the_report_is_plain_json_and_readable_text() -> None:
    found = report.build(record(Told("llm"), Told("semantic"), Told("llm", collapsed=True)), SETUP, SIMULATED)
    assert orjson.loads(orjson.dumps(found.as_dict()))["tiers"]["semantic"]["count"] == 1
    screen = Console(width=100, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    with screen.file:
        screen.print(table.render(found))
        shown = screen.export_text()
    for expected in ("3 requests", "coalesced", "semantic", "saved share", "simulated", "3 calls"):
        assert expected in shown


def test_the_bars_second_line_gives_the_share_of_each_way() -> None:
    line = progress.ways_line(record(Told("l1"), Told("l1"), Told("llm"), Told("llm", collapsed=True))).plain
    assert line.split() == ["l1", "50%", "coalesced", "25%", "llm", "25%", "errors", "0"]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_plot_is_written_in_the_format_its_name_asks_for(tmp_path: Path, suffix: str, magic: bytes) -> None:
    recorder = record(*(Told("l1" if n % 3 else "llm") for n in range(90)))
    recorder.failed(3.0, 0.5, "overloaded")
    target = tmp_path / "new" / f"plot{suffix}"
    plot.draw(recorder, report.build(recorder, SETUP, SIMULATED), target)
    assert target.read_bytes().startswith(magic)


def test_an_unknown_plot_format_is_refused_before_anything_runs() -> None:
    with pytest.raises(InvalidRequest, match=r"name it \.png"):
        plot.check(Path("plot.bmp"))


def test_the_demo_runs_from_nothing_to_its_report_and_leaves_nothing_running(tmp_path: Path) -> None:
    front_door = Path(report.__file__).parents[2] / "millpond.py"
    picture = tmp_path / "demo.png"
    done = subprocess.run(
        [sys.executable, front_door, "demo", "--requests", "100", "--json", "--plot", picture],
        cwd=tmp_path,
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = orjson.loads(done.stdout)
    assert (found["requests"], found["answered"], found["errors"]) == (100, 100, {})
    assert found["provider"] == {"name": "simulated", "simulated": True, "calls": 60, "errors": 0}
    assert (found["spent"]["calls"], found["saved"]["calls"]) == (60, 40)
    assert found["coalesced"]["count"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
