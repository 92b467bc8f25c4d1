"""Real servers for every test, and a look at what each test leaves behind.

The suite runs on each server available: `MILLPOND_TEST_REDIS_URL` alone if set (it is flushed!); else the embedded
Valkey and, when on PATH, `redis-server`; else a container.

PostgreSQL: `MILLPOND_TEST_DATABASE_URL` if set (databases named `millpond_test_*` are made and dropped there), else the
embedded one, else a container. Tests marked `every_postgresql` run on each server that Debian has installed as well.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from shared import embedded, postgres
from shared.errors import ConfigError
from shared.settings import Settings, load
from tests import databases

# In the environment, so that all processes of one run have the one that the header names.
SEED = int(os.environ.get("MILLPOND_TEST_SEED") or random.SystemRandom().randrange(1 << 32))
os.environ["MILLPOND_TEST_SEED"] = str(SEED)

#: Keys that may live without a TTL.
KEPT = re.compile(
    rb"\{mp:\d+\}:(requests|fills|refreshes|landed|touches|invalidations|dead|tags)|mp:deployment|mp:stats|mp:arq"
)
GROUPED = (b"requests", b"fills", b"refreshes", b"landed", b"touches", b"invalidations")


@dataclass(frozen=True, slots=True)
class Server:
    """A server under test. `kind` is `valkey`, `redis`, `container` or `url`."""

    kind: str
    url: str

    def connect(self) -> redis.Redis:
        """Return a plain connection to look at, or prepare, what lies in Redis."""
        connection: redis.Redis = redis.Redis.from_url(self.url)
        return connection


def _binary(kind: str) -> Path | None:
    return Path(found) if kind == "redis" and (found := shutil.which("redis-server")) else None


def _kinds() -> list[str]:
    if os.environ.get("MILLPOND_TEST_REDIS_URL"):
        return ["url"]
    kinds = ["redis"] if shutil.which("redis-server") else []
    try:
        embedded.find_binary()
        kinds.insert(0, "valkey")
    except ConfigError:
        if not kinds and databases.docker_answers():
            kinds.append("container")
    return kinds or ["none"]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes, each with servers of its own: most tests wait most of the time. One where a server is shared."""
    shared = any(os.environ.get(f"MILLPOND_TEST_{name}_URL") for name in ("REDIS", "DATABASE"))
    return 0 if shared else 2


def pytest_report_header() -> str:
    servers = ", ".join(_kinds() + databases.kinds())
    return f"millpond: seed {SEED} (MILLPOND_TEST_SEED repeats it), servers: {servers}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database_kind" in metafunc.fixturenames and metafunc.definition.get_closest_marker("every_postgresql"):
        metafunc.parametrize("database_kind", databases.kinds(), indirect=True)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def rng() -> random.Random:
    """Chance that the seed in the header repeats."""
    return random.Random(SEED)


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings leak in from the developer's environment, `.env` or `millpond.toml`."""
    for name in list(os.environ):
        if name == "OPENAI_API_KEY" or (name.startswith("MILLPOND_") and not name.startswith("MILLPOND_TEST_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", params=_kinds())
def server_kind(request: pytest.FixtureRequest) -> str:
    """Which server this test runs on."""
    kind: str = request.param
    if kind == "none":
        pytest.fail("no Redis to test on: pip install -e '.[dev]', or set MILLPOND_TEST_REDIS_URL")
    return kind


@pytest.fixture(scope="session")
def shared_server(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server process per kind and session; use `server`."""
    if server_kind == "url":
        yield Server("url", os.environ["MILLPOND_TEST_REDIS_URL"])
    elif server_kind == "container":
        from testcontainers.redis import RedisContainer

        with RedisContainer("redis:7.0") as container:
            yield Server("container", f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}")
    else:
        with embedded.start(tmp_path_factory.mktemp(server_kind), binary=_binary(server_kind)) as running:
            yield Server(server_kind, running.url)


@pytest.fixture
def server(shared_server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """An empty server, and a check that the test leaves only what may stay."""
    with shared_server.connect() as connection:
        connection.flushall()
        yield shared_server
        if request.node.get_closest_marker("leaves") is None:
            assert leftovers(connection) == []


def leftovers(connection: redis.Redis) -> list[str]:
    """Return what should not be there: keys that never expire, messages that stay pending."""
    names = [key for key in connection.scan_iter(count=1000) if connection.execute_command("PTTL", key) == -1]
    found = [f"{key.decode()} never expires" for key in names if not KEPT.fullmatch(key)]
    for key in names:
        if key.rpartition(b":")[2] in GROUPED:
            groups = connection.execute_command("XINFO GROUPS", key)
            found += [f"{key.decode()}: pending in group {group}" for group in groups if group["pending"]]
    return found


@pytest.fixture
def own_server(server_kind: str, tmp_path: Path) -> Iterator[embedded.EmbeddedRedis]:
    """A private server that the test may kill, restart, stop."""
    if server_kind in ("url", "container"):
        pytest.skip("needs a server of its own to kill")
    with embedded.start(tmp_path / "own", binary=_binary(server_kind)) as running:
        yield running


@pytest.fixture
def database_kind(request: pytest.FixtureRequest) -> str:
    """Which PostgreSQL this test runs on: the first there is, unless the test is marked `every_postgresql`."""
    kind: str = getattr(request, "param", None) or databases.kinds()[0]
    if kind == "none":
        pytest.fail("no PostgreSQL to test on: pip install -e '.[dev]', or set MILLPOND_TEST_DATABASE_URL")
    return kind


@pytest.fixture(scope="session")
def database_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[databases.Servers]:
    """The PostgreSQL servers of this session; use `database`."""
    running = databases.Servers(tmp_path_factory.mktemp("postgres"))
    with running.stack:
        yield running


@pytest.fixture
def database_server(database_kind: str, database_servers: databases.Servers) -> databases.Database:
    """The server that the session's tests share, as its own database."""
    return database_servers.get(database_kind)


@pytest.fixture
def database(database_server: databases.Database) -> Iterator[databases.Database]:
    """A database of the test's own, with the schema and nothing in it."""
    with databases.fresh(database_server) as made:
        yield made


@pytest.fixture
def empty_database(database_server: databases.Database) -> Iterator[databases.Database]:
    """A database of the test's own, before its first migration."""
    with databases.fresh(database_server, migrated=False) as made:
        yield made


@pytest.fixture
def own_database(
    database_kind: str, database_servers: databases.Servers, tmp_path: Path
) -> Iterator[postgres.EmbeddedPostgres]:
    """A private PostgreSQL, migrated, that the test may stop, kill and restart."""
    if database_kind in ("url", "container"):
        pytest.skip("needs a PostgreSQL of its own to kill")
    spare_disk = {"fsync": "off"}  # a killed server loses nothing by it, only a machine without power would
    binaries = databases.binaries(database_kind)
    place = tmp_path / "own-database"
    database_servers.copy_cluster(database_kind, place)
    with postgres.start(place, binaries=binaries, options=spare_disk) as running:
        yield running


@pytest.fixture(params=[1, 4], ids=["1-partition", "4-partitions"])
def partitions(request: pytest.FixtureRequest) -> int:
    """The number of partitions; tests of faults and invariants run with both."""
    count: int = request.param
    return count


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Settings]:
    """Return a function that makes settings on the test's servers.

    These are `server`, else `own_server`, and `database`, else `own_database`, if the test uses any.
    """

    def url_of(*fixtures: str) -> str | None:
        name = next((name for name in fixtures if name in request.fixturenames), None)
        return request.getfixturevalue(name).url if name else None

    url, database_url = url_of("server", "own_server"), url_of("database", "own_database")
    count = request.getfixturevalue("partitions") if "partitions" in request.fixturenames else None

    def make(**overrides: Any) -> Settings:
        given = {"redis_url": url, "database_url": database_url, "partitions": count, "data_dir": tmp_path / "data"}
        return load(**{name: value for name, value in given.items() if value is not None} | overrides)

    return make


@pytest.fixture(autouse=True)
def no_orphans(request: pytest.FixtureRequest) -> None:
    """An async test leaves no task behind."""
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("no_leftover_tasks")


@pytest.fixture
async def no_leftover_tasks(anyio_backend: str) -> AsyncIterator[None]:
    """Set up before all others, so looked at after all others are torn down."""
    before = asyncio.all_tasks()
    yield
    for _ in range(3):  # what was cancelled may take a turn to end
        await asyncio.sleep(0)
    left = [task for task in asyncio.all_tasks() - before if not task.done() and "TestRunner" not in repr(task)]
    assert left == [], "tasks were left behind"
