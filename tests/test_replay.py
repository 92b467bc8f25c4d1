"""The driver, the account it gives, and the demo from end to end."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
import typer
import uvloop
from rich.console import Console

from producers import replay_command
from producers.replay import plot, progress, report, session, table, words
from producers.replay.record import Recorder
from producers.replay.run import Run
from producers.replay.workload import Request
from shared.errors import InvalidRequest, ProviderTimeout
from shared.prices import cost
from shared.settings import Endpoint, load
from tests.faults_support import until

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}
PRICED = ("gpt-4o-mini", 1000, 100)
SETUP = report.Setup("file.jsonl", "as fast as answered", "the moment of sending", 100, 1.0, 0, False)
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
    replay = Run(Desk(0.002), [Request({"input": "q"})] * 300, [n / 997 for n in range(300)])
    recorder = uvloop.run(replay.complete())
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
        desk = Desk(0.01)
        replay = Run(desk, [Request({"input": "q"})] * 1000, concurrency=1)
        task = asyncio.create_task(replay.complete())
        await until(lambda: len(desk.asked) > 5, "five are answered")
        task.cancel()
        return len(await task), replay.interrupted

    done, interrupted = asyncio.run(interrupt())
    assert 5 <= done < 1000
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
    recorder.failed(0.5, 1.0, "overloaded", "full")
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


def test_the_dollars_of_a_few_tokens_are_not_rounded_away() -> None:
    told = Told("llm", model="text-embedding-3-small", usage={"prompt_tokens": 2})
    assert report.build(record(told), SETUP, SIMULATED).spent.dollars == pytest.approx(4e-8)


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


def screen_of(found: report.Report) -> str:
    """Return what a terminal of 100 columns shows."""
    screen = Console(width=100, record=True, file=io.StringIO())
    screen.print(table.render(found))
    return screen.export_text()


def test_the_report_is_plain_json_and_readable_text() -> None:
    found = report.build(record(Told("llm"), Told("semantic"), Told("llm", collapsed=True)), SETUP, SIMULATED)
    assert orjson.loads(orjson.dumps(found.as_dict()))["tiers"]["semantic"]["count"] == 1
    shown = screen_of(found)
    for expected in ("3 requests", "coalesced", "semantic", "saved share", "simulated", "3 calls"):
        assert expected in shown


def test_the_bars_second_line_gives_the_share_of_each_way() -> None:
    line = progress.ways_line(record(Told("l1"), Told("l1"), Told("llm"), Told("llm", collapsed=True))).plain
    assert line.split() == ["l1", "50%", "coalesced", "25%", "llm", "25%", "errors", "0"]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_plot_is_written_in_the_format_its_name_asks_for(tmp_path: Path, suffix: str, magic: bytes) -> None:
    recorder = record(*(Told("l1" if n % 3 else "llm") for n in range(90)))
    recorder.failed(3.0, 0.5, "overloaded", "full")
    target = tmp_path / f"plot{suffix}"
    plot.draw(recorder, report.build(recorder, SETUP, SIMULATED), target)
    assert target.read_bytes().startswith(magic)


def test_a_plot_path_is_tried_before_the_run_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("old.png").write_text("old")
    for good in ("a.png", "out/a.png", "old.png", str(tmp_path / "b.svg")):
        plot.check(Path(good))
    for bad, complaint in (
        (".", "is a directory"),
        ("missing/a.png", "there is no directory missing; make it"),
        ("file/a.png", "Not a directory; name a file"),
        ("a" * 300 + ".png", "File name too long"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            plot.check(Path(bad))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old.png"]
    assert Path("old.png").read_text() == "old"


def test_only_the_usual_directory_is_made_for_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = record(Told("l1"), Told("llm"))
    found = report.build(recorder, SETUP, SIMULATED)
    plot.draw(recorder, found, Path("out/a.svg"))
    assert Path("out/a.svg").exists()
    with pytest.raises(FileNotFoundError):
        plot.draw(recorder, found, Path("other/a.svg"))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_plot_that_fails_after_the_run_costs_only_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    recorder = record(Told("llm"))
    found = report.build(recorder, SETUP, SIMULATED)
    with pytest.raises(typer.Exit) as left:
        replay_command._finish(recorder, found, tmp_path / "gone" / "a.png", as_json)
    shown = capsys.readouterr()
    assert left.value.exit_code == 1
    assert "there is no directory" in shown.err
    if as_json:
        told = orjson.loads(shown.out)
        assert (told["requests"], told["plot"]) == (1, None)
        assert "there is no directory" in told["plot_error"]
    else:
        assert "1 request from" in shown.out


def test_the_first_message_of_each_error_is_reported() -> None:
    recorder = record(Told("llm"))
    for message in ("unknown profile 'x';\n\x1b[31mknown: response", "another"):
        recorder.failed(0.0, 0.1, "invalid_request", message)
    found = report.build(recorder, SETUP, SIMULATED)
    assert found.error_messages == {"invalid_request": "unknown profile 'x';\n\x1b[31mknown: response"}
    assert "First invalid_request: unknown profile 'x'; [31mknown: response" in screen_of(found)


def test_the_tiers_of_every_deployment_are_always_in_the_report() -> None:
    found = report.build(record(Told("semantic")), SETUP, SIMULATED)
    assert list(found.tiers) == ["l1", "l2", "semantic", "llm"]


def test_one_is_singular_and_less_than_one_a_second_is_not_none() -> None:
    found = report.build(record(Told("llm"), wall=25.0), SETUP, report.Provider("simulated", True, 1, 0))
    shown = screen_of(found)
    assert found.answered_per_s == 0.04
    assert "1 request from" in shown
    assert "0.04 answers/s" in shown
    assert "counted 1 call." in shown
    assert [words.per_second(rate) for rate in (0.0, 0.5, 3.46, 9.99, 1234.5)] == ["0", "0.5", "3.5", "10", "1,234"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rate": float("inf")}, "--rate is inf"),
        ({"rate": float("nan")}, "--rate is nan"),
        ({"rate": 1.0, "speedup": float("inf")}, "--speedup is inf"),
        ({"speedup": 2.0}, "no arrivals to speed up"),
        ({"speedup": 2.0, "flat_out": True}, "--flat-out and --speedup exclude"),
        ({"tenant": "a b"}, "tenant must be .* without white space"),
        ({"profile": ""}, "profile must be"),
        ({"model": "a\nb"}, "model must be"),
        ({"timeout": float("nan")}, "timeout must be a number of seconds"),
        ({"file": Path()}, "is a directory"),
        ({"file": Path("nowhere")}, "nowhere: No such file"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_sent(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n")
    with pytest.raises(InvalidRequest, match=complaint):
        session.prepare(session.Plan(**{"file": file} | options))


def test_the_concurrency_in_force_is_told_whether_given_or_not() -> None:
    assert Run(Desk(), []).concurrency == 100
    assert Run(Desk(), [], []).concurrency == 20_000
    assert Run(Desk(), [], concurrency=7).concurrency == 7


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


def test_a_simulated_provider_is_told_by_what_it_is_when_nothing_was_computed() -> None:
    chosen = load(provider="openai", providers={"openai": Endpoint(kind="simulated")})
    assert session._provider(chosen, Recorder(), {}, None).simulated
    assert not session._provider(load(provider="openai"), Recorder(), {}, None).simulated
