"""`millpond up`, one process that runs everything, and `millpond worker`, which runs one of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import migrations
from shared import postgres
from shared.errors import Unavailable
from tests.command_line import FAST, await_that, run, run_json
from tests.conftest import Server
from tests.databases import Database, run_sql
from tests.faults_support import until
from tests.processes import UNUSABLE_DIRECTORIES, Process, start_worker
from tests.proxy import Proxy
from workers import commands
from workers.kinds import BACKGROUND


def up(*arguments: str, **overrides: Any) -> Process:
    """Start `millpond up` and wait until all is ready; without PostgreSQL and what needs it, unless `l3` is true."""
    background = [] if overrides.get("l3") else ["--no-background"]
    process = Process(["up", *background, *arguments], None, FAST | {"l3": False} | overrides)
    process.wait_for("running")
    return process


def last_event(running: Process, component: str) -> Any:
    return [line["event"] for line in running.lines if line.get("component") == component][-1]


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# up


def test_up_is_found_by_ask_and_keeps_its_data_over_a_restart() -> None:
    with up("--lookup", "2", l3=True) as running:
        assert running.wait_for("running")["seconds"] < 20
        started = {line["component"]: line["pid"] for line in running.lines if line["event"] == "ready"}
        background = {f"{kind}-1" for kind in BACKGROUND}
        assert set(started) == {"lookup-1", "lookup-2", "llm-1", *background, "redis", "postgres"}
        assert run_json("migrate")["applied"] == []
        assert run_json("ask", "What is a millpond?")["tier"] == "llm"
        assert running.terminate() == 0
        assert all(ended(pid) for pid in started.values())
        stopped = [line["component"] for line in running.lines if line["event"] == "stopped"]
        assert stopped[-2:] == ["postgres", "redis"]
        assert set(stopped) == set(started)
    with up() as running:
        assert [line["event"] for line in running.lines if line.get("component") == "postgres"] == ["skipped"]
        assert run_json("ask", "What is a millpond?")["tier"] == "l2"
        assert running.terminate() == 0


def test_ctrl_c_stops_an_ephemeral_one_that_leaves_no_data(tmp_path: Path) -> None:
    with up("--ephemeral", data_dir=tmp_path / "here", l3=True) as running:
        running.send(signal.SIGINT)
        assert running.wait() == 0
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["postgres.lock", "server.lock"]


def test_a_second_up_on_the_same_data_is_refused() -> None:
    with up("--llm", "0"):
        done = run("up")
    assert done.returncode == 2
    assert "another `millpond up` runs on" in done.stderr


@pytest.mark.parametrize("unusable", UNUSABLE_DIRECTORIES)
def test_up_on_an_unusable_data_directory_says_which_setting_is_wrong(tmp_path: Path, unusable: str) -> None:
    (tmp_path / "file").touch()
    target = UNUSABLE_DIRECTORIES[unusable](tmp_path)
    done = run("up", data_dir=target)
    assert done.returncode == 2
    assert "MILLPOND_DATA_DIR" in done.stderr
    error = json.loads(run("up", "--json", data_dir=target).stdout)["error"]
    assert (error["code"], error["field"]) == ("config", "data_dir")


def test_a_killed_worker_and_killed_servers_are_started_again() -> None:
    with up(l3=True) as running:
        worker = running.wait_for("ready", component="lookup-1")
        os.kill(worker["pid"], signal.SIGKILL)
        assert running.wait_for("exited", component="lookup-1")["detail"] == "killed by SIGKILL"
        await_that(lambda: sum(line.get("component") == "lookup-1" for line in running.lines) == 3)
        assert run_json("ask", "before")["tier"] == "llm"
        for component in ("redis", "postgres"):
            os.kill(running.wait_for("ready", component=component)["pid"], signal.SIGKILL)
            running.wait_for("exited", component=component)
            await_that(lambda of=component: last_event(running, of) == "ready")  # type: ignore[misc]
        assert run_json("ask", "after")["tier"] == "llm"
        assert run_json("migrate")["applied"] == []
        assert running.terminate() == 0


def test_up_gives_up_on_settings_its_workers_refuse() -> None:
    with up() as running:
        running.terminate()
    done = run("up", "--json", partitions=3, l3=False)
    assert done.returncode == 2
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert any("MILLPOND_PARTITIONS=1" in line.get("detail", "") for line in said)
    assert said[-1] == {"event": "stopped", "component": "redis"}


def test_up_gives_up_on_a_configured_server_that_never_answers(tmp_path: Path) -> None:
    done = run("up", "--json", url=f"unix://{tmp_path}/nobody", l3=False)
    assert done.returncode == 3, done.stdout
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(line["event"] == "error" and "cannot reach Redis" in line["detail"] for line in said)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux only")
def test_nothing_outlives_a_killed_supervisor() -> None:
    with up(l3=True) as running:
        pids = [line["pid"] for line in running.lines if line["event"] == "ready"]
        running.sigkill()
        await_that(lambda: all(ended(pid) for pid in pids))


def test_a_configured_database_that_is_away_is_migrated_once_it_answers(
    own_database: postgres.EmbeddedPostgres,
) -> None:
    run_sql(own_database.url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    own_database.kill()
    with up(l3=True, database_url=own_database.url) as running:
        assert "going on without it" in running.wait_for("error", component="postgres")["detail"]
        own_database.restart()
        running.wait_for("migrated")
        assert migrations.current(own_database.url) == migrations.KNOWN[-1]
        for kind in BACKGROUND:
            running.wait_for("ready", component=f"{kind}-1")
        assert running.terminate() == 0


def test_up_refuses_a_database_that_is_newer_than_itself(database: Database) -> None:
    run_sql(database.url, f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'")
    done = run("up", "--json", database_url=database.url)
    assert done.returncode == 2
    assert json.loads(done.stdout.splitlines()[-1])["error"]["field"] == "database_url"


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


async def test_a_worker_that_waits_for_redis_still_stops_when_asked(tmp_path: Path) -> None:
    async with Proxy.to(f"unix://{tmp_path}/nobody") as proxy:
        with start_worker("llm", proxy.url, ready=False) as worker:
            await until(lambda: proxy.refused >= 3, "it has tried to reach Redis, and waits")
            assert await asyncio.to_thread(worker.terminate) == 0


async def test_a_worker_gives_up_on_redis_after_some_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_REACH_PAUSES", (0.01, 0.01))
    with pytest.raises(Unavailable, match="millpond doctor"):
        await commands._reach(f"unix://{tmp_path}/nobody", asyncio.Event())
