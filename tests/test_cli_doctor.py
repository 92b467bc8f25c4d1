"""What `stats` and `doctor` say of a deployment, and what they tell one to do."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import migrations
from shared.embedded import EmbeddedRedis
from shared.keys import PartitionKeys
from shared.postgres import EmbeddedPostgres
from tests import command_line
from tests.command_line import await_that, run, run_json
from tests.conftest import Server
from tests.databases import Database, run_sql
from tests.processes import FRONT_DOOR, start_worker
from workers import tables

deployment = command_line.deployment


def test_stats_count_what_happened_and_name_the_workers(deployment: str) -> None:
    for _ in range(3):
        run_json("ask", "counted", url=deployment)
    await_that(lambda: run_json("stats", url=deployment)["counters"].get("requests") == 3)
    seen = run_json("stats", url=deployment)
    assert seen["rates"] == {"hit.l1": 0.3333, "hit.l2": 0.3333, "collapsed": 0.0, "miss": 0.3333}
    assert [worker["kind"] for worker in seen["workers"]] == ["llm", "lookup"]
    assert {queue["stream"] for queue in seen["queues"]} >= {"requests", "fills", "refreshes"}
    assert seen["database"] is None
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
    no_database = {"postgresql", "background"}
    assert {s for s, level in levels(report).items() if level != "ok"} - no_database == {"provider"}


def test_the_doctor_judges_the_workers_and_not_its_own_shell(server: Server) -> None:
    with start_worker("lookup", server.url, cache_enabled=False), start_worker("llm", server.url):
        done = run("doctor", "--json", url=server.url, openai_api_key="s3cr3t-w0rd")
        found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert found["provider"]["detail"].startswith("simulated")
        assert "switched off in 1 of 1" in found["cache"]["detail"]
        assert "provider openai (workers: simulated)" in found["this shell"]["detail"]
        assert "cache on (workers: off)" in found["this shell"]["detail"]


def test_the_doctor_tells_a_simulated_provider_by_what_it_is(server: Server, tmp_path: Path) -> None:
    (tmp_path / "millpond.toml").write_text('[providers.openai]\nkind = "simulated"\n')
    for workers in (0, 1):
        with contextlib.ExitStack() as alive:
            if workers:
                alive.enter_context(start_worker("llm", server.url, openai_api_key="s3cr3t-w0rd"))
            done = run("doctor", "--json", url=server.url, openai_api_key="s3cr3t-w0rd")
        found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
        said = found["provider"]
        assert (said["level"], said["detail"].startswith("simulated/openai")) == ("warn", True)
        assert "set providers.openai.kind to openai" in said["detail"] + said["advice"]
        assert "this shell" not in found


@pytest.mark.parametrize(
    ("item", "says"),
    [("nowhere:m", "no provider 'nowhere'; known: cheap, openai, simulated"), ("openai", "needs a key")],
)
def test_the_doctor_names_a_chain_that_no_worker_would_start_with(
    server: Server, tmp_path: Path, item: str, says: str
) -> None:
    chain = f'[providers.cheap]\nkind = "simulated"\n[profiles.faq]\nproviders = ["cheap:m", "{item}"]\n'
    (tmp_path / "millpond.toml").write_text(chain)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for workers, level in ((0, "fail"), (1, "warn")):
        with contextlib.ExitStack() as alive:
            if workers:  # that have other settings
                alive.enter_context(start_worker("llm", server.url, cwd=elsewhere))
            done = run("doctor", "--json", url=server.url)
        found = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert found["chain"]["level"] == level
        assert found["chain"]["detail"].startswith("profiles.faq.providers: ")
        assert says in found["chain"]["detail"]


def test_the_doctor_says_that_an_embedded_postgresql_is_silent(own_database: EmbeddedPostgres) -> None:
    assert levels(json.loads(run("doctor", "--json", data_dir=own_database.data_dir).stdout))["postgresql"] == "ok"
    own_database.kill()
    found = json.loads(run("doctor", "--json", data_dir=own_database.data_dir).stdout)["findings"]
    (told,) = [finding for finding in found if finding["subject"] == "postgresql"]
    assert (told["level"], "does not answer" in told["detail"], "millpond up" in told["advice"]) == ("fail", True, True)


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


def test_migrate_says_from_where_to_where(empty_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_DATABASE_URL", empty_database.url)
    newest = migrations.KNOWN[-1]
    assert run_json("migrate") == {"before": None, "after": newest, "applied": migrations.KNOWN}
    assert run_json("migrate") == {"before": newest, "after": newest, "applied": []}
    run_sql(empty_database.url, f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'")
    assert run_json("migrate", status=2)["error"]["field"] == "database_url"


@pytest.mark.every_postgresql
def test_the_doctor_and_stats_tell_of_postgresql(
    server: Server, empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLPOND_DATABASE_URL", empty_database.url)
    found = levels(run_json("doctor", url=server.url, status=1))
    assert (found["postgresql"], found["schema"], found["similarity"]) == ("ok", "fail", "ok")
    assert "no schema yet: millpond migrate" in run("stats", url=server.url).stdout
    migrations.migrate(empty_database.url)
    assert levels(run_json("doctor", url=server.url))["schema"] == "ok"
    assert run_json("stats", url=server.url)["database"]["answers"] == 0


def test_the_doctor_says_that_postgresql_is_away_and_never_its_password(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLPOND_DATABASE_URL", "postgresql://me:s3cr3t-w0rd@127.0.0.1:1/mine")
    done = run("doctor", "--json", url=server.url)
    assert levels(json.loads(done.stdout))["postgresql"] == "fail"
    assert "s3cr3t-w0rd" not in done.stdout + done.stderr
    shown = run("stats", url=server.url).stdout
    assert "postgresql://me:***@127.0.0.1:1/mine" in shown


def test_what_waits_for_postgresql_is_told_with_its_age(deployment: str, server: Server) -> None:
    with server.connect() as connection:
        seconds, _ = connection.execute_command("TIME")
        connection.xadd(PartitionKeys(0).landed, {"key": "k"}, id=f"{(int(seconds) - 600) * 1000}-0")
    assert 599 < run_json("stats", url=deployment)["streams"][0]["landed_seconds"] < 660
    assert "waiting for it: 1, the oldest for 60" in run("stats", url=deployment).stdout
    assert levels(run_json("doctor", url=deployment))["persistence lag"] == "warn"


def test_the_doctor_never_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_OPENAI_API_KEY", "s3cr3t-w0rd")
    monkeypatch.setenv("MILLPOND_NONSENSE", "1")
    done = run("doctor", url="redis://user:s3cr3t-w0rd@127.0.0.1:1/0")
    assert done.returncode == 1
    assert "s3cr3t-w0rd" not in done.stdout + done.stderr
    assert "user:***@127.0.0.1" in done.stdout
    assert "key present" in done.stdout
    assert "MILLPOND_NONSENSE is no setting" in done.stdout
