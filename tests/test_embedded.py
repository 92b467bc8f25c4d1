"""The embedded server: one per data directory, found by others, keeping its data, leaving nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from shared import embedded
from shared.errors import ConfigError, Unavailable
from shared.settings import Settings, load
from tests.processes import UNUSABLE_DIRECTORIES

ROOT = Path(__file__).parent.parent


def connect(server: embedded.EmbeddedRedis) -> redis.Redis:
    connection: redis.Redis = redis.Redis.from_url(server.url)
    return connection


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"{pid} still runs"
        time.sleep(0.01)


def test_it_is_found_while_it_runs_and_not_after(own_server: embedded.EmbeddedRedis) -> None:
    assert embedded.find(own_server.data_dir) == own_server.url
    own_server.stop()
    assert embedded.find(own_server.data_dir) is None


@pytest.mark.parametrize("unusable", UNUSABLE_DIRECTORIES)
def test_an_unusable_data_directory_is_a_config_error(tmp_path: Path, unusable: str) -> None:
    (tmp_path / "file").touch()
    target = UNUSABLE_DIRECTORIES[unusable](tmp_path)
    with pytest.raises(ConfigError, match="MILLPOND_DATA_DIR") as caught:
        embedded.start(target)
    assert caught.value.field == "data_dir"
    assert str(target) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_is_private_and_listens_on_no_port(own_server: embedded.EmbeddedRedis) -> None:
    assert own_server.data.stat().st_mode & 0o077 == 0
    assert own_server.socket.stat().st_mode & 0o077 == 0
    with connect(own_server) as connection:
        assert connection.execute_command("CONFIG GET", "port") == {"port": "0"}
        assert connection.execute_command("CONFIG GET", "maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_data_outlives_a_stop_and_a_restart(own_server: embedded.EmbeddedRedis) -> None:
    with connect(own_server) as connection:
        connection.set("kept", "yes")
        own_server.restart()
        assert connection.get("kept") == b"yes"
    own_server.stop()
    with embedded.start(own_server.data_dir, binary=own_server.binary) as again, connect(again) as connection:
        assert connection.get("kept") == b"yes"


def test_a_wiped_restart_has_lost_everything(own_server: embedded.EmbeddedRedis) -> None:
    with connect(own_server) as connection:
        connection.set("kept", "no")
        own_server.kill()
        own_server.restart(wipe=True)
        assert connection.get("kept") is None


def test_a_second_one_on_the_same_data_is_refused(own_server: embedded.EmbeddedRedis) -> None:
    with pytest.raises(ConfigError, match="another `millpond up` runs on"):
        embedded.start(own_server.data_dir)
    with connect(own_server) as connection:
        assert connection.ping()


def test_a_record_of_a_dead_server_does_not_mislead(own_server: embedded.EmbeddedRedis) -> None:
    own_server.kill()
    assert (own_server.data_dir / "server.json").exists()
    assert embedded.find(own_server.data_dir) is None


def test_who_finds_none_is_told_whether_one_should_run(own_server: embedded.EmbeddedRedis) -> None:
    mine = load(data_dir=own_server.data_dir)
    own_server.kill()
    with pytest.raises(Unavailable, match="does not answer: if `millpond up` still runs there, try again"):
        embedded.resolve_url(mine)
    own_server.stop()
    with pytest.raises(Unavailable, match="no Redis: run `millpond up`"):
        embedded.resolve_url(mine)


def test_it_starts_over_a_stale_socket_and_record(tmp_path: Path) -> None:
    data = tmp_path / "redis"
    data.mkdir()
    (data / "redis.sock").touch()
    (tmp_path / "server.json").write_text('{"url": "unix:///nowhere", "pid": 1, "socket": "/nowhere"}')
    with embedded.start(tmp_path) as server:
        assert embedded.find(tmp_path) == server.url


def test_a_data_directory_too_deep_for_a_socket_gets_it_elsewhere(tmp_path: Path) -> None:
    deep = tmp_path / ("deep-" * 20) / "er"
    with embedded.start(deep) as server:
        socket = server.socket
        assert len(os.fsencode(socket)) <= embedded.SOCKET_PATH_LIMIT
        assert embedded.find(deep) == server.url
    assert not socket.parent.exists()


def test_a_path_with_odd_characters_is_reached(tmp_path: Path) -> None:
    with embedded.start(tmp_path / "a b%3f?#é") as server, connect(server) as connection:
        assert connection.ping()


def test_an_ephemeral_one_leaves_no_data(tmp_path: Path) -> None:
    with embedded.start(tmp_path, ephemeral=True) as server, connect(server) as connection:
        connection.set("kept", "no")
        assert embedded.find(tmp_path) == server.url
        place = server.data
    assert not place.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.lock"]


def test_a_server_that_cannot_start_says_why_and_frees_the_directory(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"at start: .*whole log"):
        embedded.start(tmp_path, options={"no-such-option": "1"})
    with embedded.start(tmp_path) as server:
        assert server.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux only")
def test_it_dies_with_a_killed_starter_and_the_data_survive(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from shared import embedded; "
        "s = embedded.start(Path(sys.argv[1])); print(s.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        url = embedded.find(tmp_path)
        assert url is not None
        with redis.Redis.from_url(url) as connection:
            connection.set("kept", "yes")
        starter.send_signal(signal.SIGKILL)
    await_end(pid)
    with embedded.start(tmp_path) as server, connect(server) as connection:
        assert connection.get("kept") == b"yes"


def test_one_left_behind_is_stopped_before_the_next_starts(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from shared import embedded; "
        "s = embedded.start(Path(sys.argv[1]), die_with_caller=False); print(s.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, cwd=ROOT, check=True)
    left = int(done.stdout)
    assert alive(left)
    with embedded.start(tmp_path) as server:
        assert server.pid != left
        assert not alive(left)


def test_a_url_is_the_configured_one_else_the_running_one_else_advice(
    own_server: embedded.EmbeddedRedis, settings: Callable[..., Settings]
) -> None:
    assert embedded.resolve_url(settings(redis_url="redis://elsewhere")) == "redis://elsewhere"
    assert embedded.resolve_url(settings(redis_url=None, data_dir=own_server.data_dir)) == own_server.url
    with pytest.raises(Unavailable, match=r"run `millpond up` in another terminal, or set MILLPOND_REDIS_URL"):
        embedded.resolve_url(settings(redis_url=None))
