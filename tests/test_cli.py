"""The `millpond` command: one process that runs everything, and commands whose exit codes mean something."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import millpond
from producers import commands as producing
from shared.embedded import EmbeddedRedis
from shared.errors import Unavailable
from shared.keys import PartitionKeys
from shared.messages import Mode
from shared.settings import Settings
from tests.conftest import Server
from tests.processes import FRONT_DOOR, Process, start_worker
from workers import commands, tables

FAST: dict[str, Any] = {"simulated_first_token": 0.01, "simulated_tokens_per_second": 100_000}
COMMANDS = ("up", "worker", "ask", "replay", "demo", "invalidate", "stats", "dead", "bench", "doctor")


def run(
    *arguments: str, url: str | None = None, stdin: str | None = None, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    environment = os.environ | {f"MILLPOND_{name.upper()}": str(value) for name, value in settings.items()}
    if url is not None:
        environment["MILLPOND_REDIS_URL"] = url
    done = subprocess.run(
        [sys.executable, FRONT_DOOR, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_json(*arguments: str, url: str | None = None, status: int = 0, stdin: str | None = None) -> dict[str, Any]:
    """Run one command with `--json`; return the object it printed."""
    done = run(*arguments, "--json", url=url, stdin=stdin)
    assert done.returncode == status, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def up(*arguments: str, **overrides: Any) -> Process:
    """Start `millpond up` and wait until all is ready."""
    process = Process(["up", *arguments], None, FAST | overrides)
    process.wait_for("running")
    return process


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def await_that(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


@pytest.fixture
def deployment(server: Server) -> Iterator[str]:
    """The URL of a server with a worker of each kind."""
    with start_worker("lookup", server.url) as lookup, start_worker("llm", server.url, **FAST) as llm:
        yield server.url
        assert (lookup.terminate(), llm.terminate()) == (0, 0)


# the front door


def test_the_import_is_light() -> None:
    code = "import sys, millpond; millpond.Client; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=FRONT_DOOR.parent, check=True
    ).stdout.split()
    assert {"typer", "rich", "openai", "zstandard", "workers"}.isdisjoint(loaded)


def test_the_stub_names_what_the_front_door_opens() -> None:
    stub = (FRONT_DOOR.parent / "millpond-stubs" / "__init__.pyi").read_text()
    stubbed = {line.split(" as ")[1] for line in stub.splitlines() if " as " in line}
    assert stubbed == set(millpond.__all__)
    assert all(hasattr(millpond, name) for name in millpond.__all__)
    with pytest.raises(AttributeError):
        getattr(millpond, "nothing_of_the_kind")  # noqa: B009


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command: str) -> None:
    helps = [run(command, "--help")]
    if command == "dead":
        helps += [run("dead", sub, "--help") for sub in ("list", "show", "retry", "discard")]
    assert all(found.returncode == 0 and "Example" in found.stdout for found in helps)
    assert "--json" in helps[-1].stdout


def test_help_lists_every_command() -> None:
    found = run("--help").stdout
    assert [command for command in COMMANDS if command not in found] == []


@pytest.mark.parametrize("delay", [0.05, 0.15, 0.25, 0.4])
def test_ctrl_c_at_any_moment_prints_no_traceback(server: Server, delay: float) -> None:
    asking = subprocess.Popen(
        [sys.executable, "-c", "import millpond; print(flush=True); millpond.main()", "ask", "nobody answers"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=FRONT_DOOR.parent,
        env=os.environ | {"MILLPOND_REDIS_URL": server.url},
    )
    assert asking.stdout is not None
    asking.stdout.readline()
    time.sleep(delay)
    asking.send_signal(signal.SIGINT)
    _, errors = asking.communicate(timeout=30)
    assert (asking.returncode, errors) == (130, "")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(("stats", "--nonsense"), None), (("dead", "list", "--limit", "few"), "limit"), (("nothing-of-the-kind",), None)],
)
def test_usage_errors_are_json_too(arguments: tuple[str, ...], field: str | None) -> None:
    error = run_json(*arguments, status=2)["error"]
    assert (error["code"], error.get("field")) == ("invalid_request", field)


def test_help_says_where_json_comes_in_lines() -> None:
    helps = [" ".join(run(command, "--help").stdout.split()) for command in ("up", "worker", "stats")]
    assert all("one object per line" in found.replace(" │ │ ", " ") for found in helps)


# up


def test_up_is_found_by_ask_and_keeps_its_data_over_a_restart() -> None:
    with up("--lookup", "2") as running:
        assert running.wait_for("running")["seconds"] < 10
        pids = [line["pid"] for line in running.lines if line["event"] == "ready"]
        assert len(pids) == 4
        assert run_json("ask", "What is a millpond?")["tier"] == "llm"
        assert running.terminate() == 0
        assert all(ended(pid) for pid in pids)
        stopped = [line["component"] for line in running.lines if line["event"] == "stopped"]
        assert stopped[-1] == "redis"
        assert set(stopped) == {"lookup-1", "lookup-2", "llm-1", "redis"}
    with up() as running:
        assert run_json("ask", "What is a millpond?")["tier"] == "l2"
        assert running.terminate() == 0


def test_ctrl_c_stops_an_ephemeral_one_that_leaves_no_data(tmp_path: Path) -> None:
    with up("--ephemeral", data_dir=tmp_path / "here") as running:
        running.send(signal.SIGINT)
        assert running.wait() == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["server.lock"]


def test_a_second_up_on_the_same_data_is_refused() -> None:
    with up("--llm", "0"):
        done = run("up")
    assert done.returncode == 2
    assert "another `millpond up` runs on" in done.stderr


def test_a_killed_worker_and_a_killed_server_are_started_again() -> None:
    with up() as running:
        worker = running.wait_for("ready", component="lookup-1")
        os.kill(worker["pid"], signal.SIGKILL)
        assert running.wait_for("exited", component="lookup-1")["detail"] == "killed by SIGKILL"
        await_that(lambda: sum(line.get("component") == "lookup-1" for line in running.lines) == 3)
        assert run_json("ask", "before")["tier"] == "llm"
        os.kill(running.wait_for("ready", component="redis")["pid"], signal.SIGKILL)
        running.wait_for("exited", component="redis")
        await_that(lambda: [line["event"] for line in running.lines if line.get("component") == "redis"][-1] == "ready")
        assert run_json("ask", "after")["tier"] == "llm"
        assert running.terminate() == 0


def test_up_gives_up_on_settings_its_workers_refuse() -> None:
    with up() as running:
        running.terminate()
    done = run("up", "--json", partitions=3)
    assert done.returncode == 2
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert any("MILLPOND_PARTITIONS=1" in line.get("detail", "") for line in said)
    assert said[-1] == {"event": "stopped", "component": "redis"}


def test_up_gives_up_on_a_configured_server_that_never_answers(tmp_path: Path) -> None:
    done = run("up", "--json", url=f"unix://{tmp_path}/nobody")
    assert done.returncode == 3, done.stdout
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(line["event"] == "error" and "cannot reach Redis" in line["detail"] for line in said)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux only")
def test_nothing_outlives_a_killed_supervisor() -> None:
    with up() as running:
        pids = [line["pid"] for line in running.lines if line["event"] == "ready"]
        running.sigkill()
        await_that(lambda: all(ended(pid) for pid in pids))


def test_a_frozen_worker_is_killed_after_the_grace_period() -> None:
    with up(drain_timeout=0) as running:
        os.kill(running.wait_for("ready", component="llm-1")["pid"], signal.SIGSTOP)
        running.send(signal.SIGTERM)
        running.wait_for("stopped", component="lookup-1")
        running.send(signal.SIGTERM)  # asked twice: at once
        assert running.wait(5) == 0
        assert running.wait_for("killed")["component"] == "llm-1"


# worker


def test_a_worker_says_it_is_ready_and_stops_when_asked(server: Server) -> None:
    with start_worker("lookup", server.url) as worker:
        assert worker.name.startswith("lookup-")
        assert worker.terminate() == 0
        assert worker.wait_for("stopped")["name"] == worker.name


@pytest.mark.parametrize(
    "command",
    [
        ("worker", "lookup"), ("ask", "x"), ("stats",), ("invalidate", "--all"),
        ("dead", "list"), ("dead", "show", "1-0"), ("dead", "retry", "--all"), ("dead", "discard", "--all"),
    ],
)  # fmt: skip
def test_without_any_deployment_redis_is_unavailable(command: tuple[str, ...]) -> None:
    done = run(*command)
    assert done.returncode == 3
    assert "run `millpond up` in another terminal" in done.stderr


def test_a_worker_that_waits_for_redis_still_stops_when_asked(tmp_path: Path) -> None:
    with start_worker("llm", f"unix://{tmp_path}/nobody", ready=False) as worker:
        await_that(lambda: b"SigCgt:\t0000000000000000" not in Path(f"/proc/{worker.pid}/status").read_bytes())
        time.sleep(1)
        assert worker.terminate() == 0


async def test_a_worker_gives_up_on_redis_after_some_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_REACH_PAUSES", (0.01, 0.01))
    with pytest.raises(Unavailable, match="millpond doctor"):
        await commands._reach(f"unix://{tmp_path}/nobody", asyncio.Event())


# ask, invalidate


def test_ask_answers_on_stdout_and_tells_how_on_stderr(deployment: str) -> None:
    first = run("ask", "What is a millpond?", url=deployment)
    again = run("ask", "What is a millpond?", url=deployment)
    assert first.returncode == again.returncode == 0
    assert first.stdout == again.stdout != ""
    assert first.stderr.startswith("llm")
    assert again.stderr.startswith("l2")


def test_what_is_invalidated_is_asked_anew(deployment: str) -> None:
    tagged = ("ask", "Who owns the pond?", "--tag", "doc:42")
    run_json(*tagged, url=deployment)
    assert run_json(*tagged, url=deployment)["tier"] == "l2"
    assert len(run_json("invalidate", "--tag", "doc:42", url=deployment)["invalidated"]) == 1
    assert run_json(*tagged, url=deployment)["tier"] == "llm"


def test_exit_codes_of_ask_say_what_went_wrong(deployment: str, tmp_path: Path) -> None:
    wrong = run_json("ask", "x", "--profile", "nobody's", url=deployment, status=2)
    assert (wrong["error"]["code"], wrong["error"]["field"]) == ("invalid_request", "profile")
    run_json("ask", "x", "--mode", "sometimes", url=deployment, status=2)
    run_json("invalidate", url=deployment, status=2)
    run_json("ask", "x", "--timeout", "0.5", url=f"unix://{tmp_path}/nobody", status=3)
    missing = run_json("ask", "never asked", "--mode", "only-if-cached", url=deployment, status=6)
    assert missing["error"]["code"] == "not_cached"


def test_a_deadline_and_a_failing_provider_have_their_own_exit_codes(server: Server) -> None:
    with start_worker("lookup", server.url):
        run_json("ask", "x", "--timeout", "0.2", url=server.url, status=4)
        with start_worker("llm", server.url, **FAST, simulated_failure_rate=1, attempts=1):
            run_json("ask", "y", url=server.url, status=7)
            await_that(lambda: not server.connect().exists(PartitionKeys(0).flight("x")))


def test_the_modes_on_the_command_line_are_those_of_the_protocol() -> None:
    assert tuple(producing.Mode) == get_args(Mode)
    assert "only-if-cached" in run("ask", "--help").stdout


def test_ask_takes_a_scope_a_system_message_and_standard_input(deployment: str) -> None:
    scoped = ("ask", "And the price?", "--profile", "conversation", "--scope")
    first = run_json(*scoped, "conversation_id=1", url=deployment)
    assert run_json(*scoped, "conversation_id=2", url=deployment)["key"] != first["key"]
    for wrong in ("conversation_id", "=1", "conversation_id="):
        assert run_json(*scoped, wrong, url=deployment, status=2)["error"]["field"] == "scope"
    plain = run_json("ask", "Who owns it?", url=deployment)
    assert run_json("ask", "Who owns it?", "--system", "Be brief.", url=deployment)["key"] != plain["key"]
    piped = run_json("ask", "-", url=deployment, stdin="Who owns it?\n")
    assert (piped["key"], piped["tier"]) == (plain["key"], "l2")
    run_json("ask", "-", "--system", "Be brief.", url=deployment, stdin="\n", status=2)


def test_ask_as_json_has_the_body_and_why_it_was_not_stored(deployment: str) -> None:
    found = run_json("ask", "Once only", "--mode", "no-store", url=deployment)
    assert found["body"]["choices"][0]["message"]["content"] == found["text"]
    assert (found["stored"], found["detail"]) == (False, "no-store")
    assert "not stored (no-store)" in run("ask", "Once more", "--mode", "no-store", url=deployment).stderr


def test_invalidate_says_what_it_covered_and_doubts_an_unknown_profile(server: Server) -> None:
    found = run_json("invalidate", "--tag", "doc:42", "--tenant", "acme", url=server.url)
    assert (found["labels"], found["partitions"]) == (["doc:42", "tenant:acme"], 1)
    done = run("invalidate", "--profile", "respons", url=server.url)
    assert done.returncode == 0
    assert done.stdout == "forgotten: profile:respons; in 1 partition\n"
    assert "warning: no profile 'respons'" in done.stderr
    assert run("invalidate", "--all", url=server.url).stderr == ""


# stats, doctor


def test_stats_count_what_happened_and_name_the_workers(deployment: str) -> None:
    for _ in range(3):
        run_json("ask", "counted", url=deployment)
    await_that(lambda: run_json("stats", url=deployment)["counters"].get("requests") == 3)
    seen = run_json("stats", url=deployment)
    assert seen["rates"] == {"hit.l1": 0.3333, "hit.l2": 0.3333, "collapsed": 0.0, "miss": 0.3333}
    assert [worker["kind"] for worker in seen["workers"]] == ["llm", "lookup"]
    assert {queue["stream"] for queue in seen["queues"]} == {"requests", "fills", "refreshes"}
    shown = run("stats", url=deployment)
    assert "Live workers" in shown.stdout
    assert all(name in shown.stdout for name in seen["counters"])


def test_every_counter_of_the_workers_is_explained() -> None:
    sources = "".join(path.read_text() for path in (FRONT_DOOR.parent / "workers").glob("*.py"))
    counted = set(re.findall(r'counters\.add\("([\w.]+)"', sources))
    assert len(counted) > 10
    assert counted | {"absent", "invalidated", "stored", "not_stored"} <= set(tables.COUNTERS)


def levels(report: dict[str, Any]) -> dict[str, str]:
    return {finding["subject"]: finding["level"] for finding in report["findings"]}


def test_the_doctor_finds_a_healthy_deployment_healthy(deployment: str) -> None:
    report = run_json("doctor", url=deployment)
    assert report["ok"]
    assert {s for s, level in levels(report).items() if level != "ok"} == {"provider"}


def test_the_doctor_judges_the_workers_and_not_its_own_shell(server: Server) -> None:
    with start_worker("lookup", server.url, cache_enabled=False), start_worker("llm", server.url):
        done = run("doctor", "--json", url=server.url, openai_api_key="s3cr3t-w0rd")
        found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert found["provider"]["detail"].startswith("simulated")
        assert "switched off in 1 of 1" in found["cache"]["detail"]
        assert "provider openai (workers: simulated)" in found["this shell"]["detail"]
        assert "cache on (workers: off)" in found["this shell"]["detail"]


def test_the_doctor_says_what_to_do_without_a_server() -> None:
    report = run_json("doctor", status=1)
    assert levels(report)["redis"] == "fail"
    assert "millpond up" in report["findings"][-1]["advice"]
    assert "→" in run("doctor").stdout


def test_the_doctor_fails_an_evicting_server_and_a_lack_of_workers(own_server: EmbeddedRedis) -> None:
    with start_worker("lookup", own_server.url) as worker:
        worker.terminate()
    run_cli = subprocess.run(
        [sys.executable, "-c", "import redis, sys; c = redis.Redis.from_url(sys.argv[1]); "
         "c.config_set('maxmemory-policy', 'allkeys-lru'); c.config_set('appendonly', 'no')", own_server.url],
        check=True,
    )  # fmt: skip
    assert run_cli.returncode == 0
    found = levels(run_json("doctor", url=own_server.url, status=1))
    assert (found["eviction"], found["persistence"]) == ("fail", "warn")
    assert (found["lookup workers"], found["llm workers"]) == ("fail", "fail")


def test_the_doctor_never_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_OPENAI_API_KEY", "s3cr3t-w0rd")
    monkeypatch.setenv("MILLPOND_NONSENSE", "1")
    done = run("doctor", url="redis://user:s3cr3t-w0rd@127.0.0.1:1/0")
    assert done.returncode == 1
    assert "s3cr3t-w0rd" not in done.stdout + done.stderr
    assert "user:***@127.0.0.1" in done.stdout
    assert "key present" in done.stdout
    assert "MILLPOND_NONSENSE is no setting" in done.stdout


# dead letters


def bury(server: Server, fields: dict[str, str], stream: str) -> str:
    names = PartitionKeys(0)
    letter = {"reason": "delivered 5 times without an outcome", "stream": stream, "id": "1-1", "deliveries": "5"}
    pairs = [part for pair in (letter | {f"m:{n}": v for n, v in fields.items()}).items() for part in pair]
    with server.connect() as connection:
        found: bytes = connection.execute_command("XADD", names.dead, "*", *pairs)
        return found.decode()


BODY = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Try me again"}]})


def test_dead_letters_are_listed_shown_and_retried_as_requests(deployment: str, server: Server) -> None:
    request = {"id": "r1", "reply": "", "deadline": "1000", "body": BODY}
    letter_id = bury(server, request, PartitionKeys(0).requests)
    (listed,) = run_json("dead", "list", url=deployment)["letters"]
    assert (listed["id"], listed["deliveries"], listed["retryable"]) == (letter_id, 5, True)
    shown = run_json("dead", "show", letter_id, url=deployment)
    assert shown["message"]["body"]["messages"][0]["content"] == "Try me again"
    assert run_json("dead", "retry", letter_id, url=deployment) == {"retried": [letter_id], "left": []}
    assert run_json("dead", "list", url=deployment) == {"letters": []}
    run_json("dead", "show", letter_id, url=deployment, status=2)
    with server.connect() as connection:
        await_that(lambda: connection.execute_command("HGET", "mp:stats", "stored") == b"1")
    assert run_json("ask", "Try me again", url=deployment)["tier"] in ("l1", "l2")


def test_a_dead_fill_is_retried_as_a_request_with_its_directives(deployment: str, server: Server) -> None:
    spec = json.dumps({"cache": {"tenant": "acme", "tags": ["doc:7"]}})
    fill = {"key": "0" * 32, "token": "t", "epoch": "0-0", "body": BODY, "spec": spec}
    bury(server, fill, PartitionKeys(0).fills)
    hopeless = bury(server, {"nonsense": "no body"}, PartitionKeys(0).fills)
    done = run_json("dead", "retry", "--all", url=deployment)
    assert (len(done["retried"]), done["left"]) == (1, [hopeless])
    assert "1 left alone, no request in them" in run("dead", "retry", "--all", url=deployment).stdout
    with server.connect() as connection:
        await_that(lambda: connection.execute_command("HGET", "mp:stats", "stored") == b"1")
    mine = run_json("ask", "Try me again", "--tenant", "acme", url=deployment)
    assert mine["tier"] in ("l1", "l2")
    assert len(run_json("dead", "list", url=deployment)["letters"]) == 1


def test_dead_letters_are_discarded_one_or_all(server: Server) -> None:
    ids = [bury(server, {"nonsense": str(n)}, PartitionKeys(0).fills) for n in range(4)]
    assert [letter["retryable"] for letter in run_json("dead", "list", url=server.url)["letters"]] == [False] * 4
    assert run_json("dead", "discard", ids[1], url=server.url) == {"discarded": [ids[1]]}
    run_json("dead", "discard", ids[1], url=server.url, status=2)
    run_json("dead", "discard", url=server.url, status=2)
    assert run("dead", "discard", "--all", "--partition", "0", url=server.url).stdout == "3 discarded\n"
    assert run_json("dead", "list", url=server.url) == {"letters": []}


def test_settings_reach_the_commands(settings: Callable[..., Settings], server: Server) -> None:
    assert settings().redis_url is not None
    done = run("stats", "--json", url=server.url, concurrency="none")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["field"] == "concurrency"
