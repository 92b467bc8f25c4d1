"""The embedded PostgreSQL: one per data directory, found by others, keeping its data, whoever starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import postgres
from shared.database import resolve_database_url
from shared.errors import ConfigError, Unavailable
from shared.postgres import EmbeddedPostgres
from shared.servers import SOCKET_PATH_LIMIT
from shared.settings import Settings
from tests.databases import run_sql
from tests.processes import UNUSABLE_DIRECTORIES, our_code_environment
from tests.test_embedded import alive, await_end

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="about what root does")


def kept(server: EmbeddedPostgres) -> bool:
    """Whether the table that `keep` made is there."""
    try:
        run_sql(server.url, "SELECT * FROM kept")
    except Exception as error:
        assert 'relation "kept" does not exist' in str(error)
        return False
    return True


def keep(server: EmbeddedPostgres) -> None:
    run_sql(server.url, "CREATE TABLE kept (x int)")


def owner(pid: int) -> int:
    """The effective user of a process, as the machine sees it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("Uid:")).split()[2])


@pytest.fixture
def no_namespaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which root may make no user namespace, as in most containers."""
    monkeypatch.setattr(postgres, "_NAMESPACE", ["unshare", "--user", "--no-such-option"])
    postgres._as_nobody.cache_clear()
    yield
    postgres._as_nobody.cache_clear()


# its life


@pytest.mark.every_postgresql
def test_it_is_found_while_it_runs_keeps_its_data_and_is_private(own_database: EmbeddedPostgres) -> None:
    keep(own_database)
    assert postgres.find(own_database.data_dir) == own_database.url
    assert own_database.data.stat().st_mode & 0o077 == 0
    assert own_database.socket.stat().st_mode & 0o077 == 0
    run_sql(own_database.url, "DO $$ BEGIN ASSERT current_setting('listen_addresses') = ''; END $$",
            "DO $$ BEGIN ASSERT current_setting('server_encoding') = 'UTF8'; END $$")  # fmt: skip
    own_database.restart()
    assert kept(own_database)
    own_database.stop()
    assert postgres.find(own_database.data_dir) is None
    with postgres.start(own_database.data_dir, binaries=own_database.binary.parent) as again:
        assert kept(again)


@pytest.mark.every_postgresql
def test_what_was_committed_survives_a_kill(own_database: EmbeddedPostgres) -> None:
    keep(own_database)
    own_database.kill()
    assert own_database.poll() == 0
    assert postgres.find(own_database.data_dir) is None
    own_database.restart()
    assert kept(own_database)


def test_a_wiped_restart_has_lost_everything(own_database: EmbeddedPostgres) -> None:
    keep(own_database)
    own_database.kill()
    own_database.restart(wipe=True)
    assert not kept(own_database)


def test_stopping_sends_away_whoever_is_connected(own_database: EmbeddedPostgres) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(own_database.socket))
        connection.sendall(b"\0\0\0\x08\x04\xd2\x16\x2f")  # SSLRequest, then silence
        connection.recv(1)
        own_database.stop()
        assert connection.recv(1) == b""


def test_a_second_one_on_the_same_data_is_refused(own_database: EmbeddedPostgres) -> None:
    with pytest.raises(ConfigError, match="another `millpond up` runs on"):
        postgres.start(own_database.data_dir)
    assert not kept(own_database)


def test_an_ephemeral_one_leaves_no_data(tmp_path: Path) -> None:
    with postgres.start(tmp_path, ephemeral=True) as server:
        assert postgres.find(tmp_path) == server.url
        place = server.data
    assert not place.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["postgres.lock"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux only")
def test_it_dies_with_a_killed_starter_and_the_data_survive(tmp_path: Path) -> None:
    with _starter(tmp_path, "time.sleep(60)") as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        url = postgres.find(tmp_path)
        assert url is not None
        run_sql(url, "CREATE TABLE kept (x int)")
        starter.send_signal(signal.SIGKILL)
    await_end(pid)
    with postgres.start(tmp_path) as server:
        assert kept(server)


def test_one_left_behind_is_stopped_before_the_next_starts(tmp_path: Path) -> None:
    with _starter(tmp_path, "os._exit(0)", die_with_caller=False) as starter:
        assert starter.stdout is not None
        left = int(starter.stdout.readline())
    assert alive(left)
    with postgres.start(tmp_path) as server:
        assert server.pid != left
        assert not alive(left)


def _starter(place: Path, then: str, *, die_with_caller: bool = True) -> subprocess.Popen[bytes]:
    code = (
        "import os, sys, time; from pathlib import Path; from shared import postgres; "
        f"s = postgres.start(Path(sys.argv[1]), die_with_caller={die_with_caller}); print(s.pid, flush=True); {then}"
    )
    return subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, env=our_code_environment())


# where it cannot start as usual


@pytest.mark.parametrize("unusable", UNUSABLE_DIRECTORIES)
def test_an_unusable_data_directory_is_a_config_error(tmp_path: Path, unusable: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="MILLPOND_DATA_DIR"):
        postgres.start(UNUSABLE_DIRECTORIES[unusable](tmp_path))


@pytest.mark.parametrize("name", ["deep-" * 30, "a b%3f?#é\"'", "with,comma"])
def test_an_odd_data_directory_is_reached(tmp_path: Path, name: str) -> None:
    with postgres.start(tmp_path / name) as server:
        run_sql(server.url, "SELECT 1")
        assert len(os.fsencode(server.socket)) <= SOCKET_PATH_LIMIT
        assert postgres.find(tmp_path / name) == server.url


def test_a_server_that_cannot_start_says_why_and_frees_the_directory(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"at start: .*no_such_option.*whole log"):
        postgres.start(tmp_path, options={"no_such_option": "1"})
    with postgres.start(tmp_path) as server:
        assert server.poll() is None


def test_a_half_made_cluster_is_made_anew(tmp_path: Path) -> None:
    half = tmp_path / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with postgres.start(tmp_path) as server:
        run_sql(server.url, "SELECT 1")


def test_a_cluster_of_another_version_is_left_alone(own_database: EmbeddedPostgres) -> None:
    own_database.stop()
    version = own_database.data / "data" / "PG_VERSION"
    version.write_text("14\n")
    with pytest.raises(ConfigError, match="was made by PostgreSQL 14") as refusal:
        postgres.start(own_database.data_dir, binaries=own_database.binary.parent)
    assert refusal.value.field == "data_dir"
    assert version.read_text() == "14\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pid_file_whose_number_is_a_strangers_by_now_does_not_keep_it_down(own_database: EmbeddedPostgres) -> None:
    own_database.kill()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        pidfile = own_database.data / "data" / "postmaster.pid"
        _, rest = pidfile.read_text().split("\n", 1)
        pidfile.write_text(f"{stranger.pid}\n{rest}")
        own_database.restart()
        assert stranger.poll() is None
        stranger.kill()


# who it runs as


@as_root
def test_root_runs_it_in_a_namespace_and_nothing_on_disk_changes_hands(tmp_path: Path) -> None:
    if postgres._as_nobody():
        pytest.skip("no user namespaces here")
    with postgres.start(tmp_path) as server:
        assert {path.stat().st_uid for path in (server.data, server.socket, server.data / "data")} == {0}


@as_root
@pytest.mark.usefixtures("no_namespaces")
def test_where_namespaces_are_forbidden_root_runs_it_as_nobody_behind_closed_directories(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with postgres.start(closed / "data") as server:
        assert owner(server.pid) == NOBODY
        assert closed.stat().st_uid == 0
        assert closed.stat().st_mode & 0o777 == 0o700
        keep(server)
        server.kill()
        server.restart()
        assert kept(server)
    with postgres.start(closed / "data", ephemeral=True) as server:
        assert owner(server.pid) == NOBODY
        assert not kept(server)


@as_root
@pytest.mark.usefixtures("no_namespaces")
def test_as_nobody_too_it_dies_with_a_killed_starter(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from shared import postgres; "
        "postgres._NAMESPACE[2] = '--no-such-option'; "
        "s = postgres.start(Path(sys.argv[1])); print(s.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, env=our_code_environment()
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert owner(pid) == NOBODY
        starter.send_signal(signal.SIGKILL)
    await_end(pid)


@as_root
@pytest.mark.usefixtures("no_namespaces")
def test_root_without_any_way_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(postgres, "_BARE", ["setpriv", "--no-such-option"])
    with pytest.raises(ConfigError, match="PostgreSQL does not run as root") as refusal:
        postgres.start(tmp_path)
    assert refusal.value.field == "database_url"


@as_root
def test_anyone_else_simply_starts_it() -> None:
    code = (
        "import sys, json, os; from pathlib import Path; from shared import postgres; "
        "s = postgres.start(Path(sys.argv[1])); print(json.dumps([os.geteuid(), postgres._disguise()])); s.stop()"
    )
    place = tempfile.mkdtemp(prefix="millpond-")  # pytest's own directories are root's alone
    try:
        os.chown(place, NOBODY, NOBODY)
        done = subprocess.run(
            [*postgres._BARE, sys.executable, "-c", code, place],  # which may pass through our directories to Python
            capture_output=True, text=True, env=our_code_environment(), check=False, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [NOBODY, []]
    finally:
        shutil.rmtree(place)


# where to find it


def test_a_url_is_the_configured_one_else_the_running_one_else_none(
    own_database: EmbeddedPostgres, settings: Callable[..., Settings]
) -> None:
    def resolved(**given: Any) -> str | None:
        return resolve_database_url(settings(**given))

    here = {"database_url": None, "data_dir": own_database.data_dir}
    assert resolved(database_url="postgresql://elsewhere") == "postgresql://elsewhere"
    assert resolved(**here) == own_database.url
    assert resolved(**here, l3=False) is None
    own_database.stop()
    assert resolved(**here) is None
