"""Redis users per role: each can do all of its work and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from producers.client import Client
from shared import keys
from shared.keys import PartitionKeys
from shared.settings import Settings, load
from tests import guarded
from tests.conftest import _binary
from tests.databases import Database
from tests.faults_support import running, until
from tests.guarded import Guarded
from workers.desk import Desk
from workers.jobs import JOBS, perform
from workers.kinds import Kind

NAMES = PartitionKeys(0)


@pytest.fixture(scope="module")
def fortress(server_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A server with our users."""
    if server_kind in ("url", "container"):
        pytest.skip("needs a server of its own, with users")
    with guarded.guarded(tmp_path_factory.mktemp("g"), _binary(server_kind)) as made:
        yield made


@asynccontextmanager
async def working(settings_of: Callable[[str], Settings]) -> AsyncIterator[None]:
    """Run one worker of each kind in this process, each as its role."""
    roles = {kind: kind if kind in ("lookup", "llm") else "background" for kind in Kind}
    async with running(*((kind, settings_of(role)) for kind, role in roles.items())):
        yield


async def test_every_role_can_do_all_of_its_work(fortress: Guarded, database: Database) -> None:
    def settings(role: str, **more: Any) -> Settings:
        quick = {"simulated_first_token": 0.01, "simulated_tokens_per_second": 1e6}
        return load(redis_url=fortress.url(role), database_url=database.url, **quick | more)

    async with working(settings):
        async with Client(settings=settings("client")) as client:
            assert [(await client.ask("Who goes there?")).tier for _ in range(3)] == ["llm", "l2", "l1"]
            assert (await client.ask("Who goes there?", mode="refresh", tags=["doc:1"])).tier == "llm"
            await client.invalidate(tags=["doc:1"])
            assert (await client.ask("Who goes there?", tags=["doc:1"])).tier == "llm"
        async with Client(settings=settings("application")) as client:
            found = await client.get_or_compute("retrieval", {"q": "x"}, lambda: [1, 2])
            assert found == [1, 2]
            await client.put("retrieval", {"q": "y"}, b"bytes")
            again = await client.get("retrieval", {"q": "y"})
            assert again is not None
            assert again.value == b"bytes"
        desk = Desk(fortress.url("background"), settings("background"), 1)
        try:
            for job in JOBS.values():
                done = await perform(desk, job, "hand")
                assert done["ok"], done
        finally:
            await desk.close()
        with fortress.connect("operator") as operator:
            assert operator.info()
            assert operator.xlen(NAMES.invalidations) >= 1
            assert len(set(operator.scan_iter("mp:worker:*"))) == len(Kind)

            def by_the_schedule() -> bool:
                return b'"by":"schedule"' in (operator.get(keys.schedule("memory")) or b"")

            await until(by_the_schedule, "arq ran a job of its own accord")
    assert fortress.refused() == []


#: What each role must not do. The names are those of partition 0.
FORBIDDEN: dict[str, list[tuple[str, ...]]] = {
    "client": [
        ("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("SCAN", "0"), ("CONFIG", "GET", "*"), ("INFO",), ("SHUTDOWN",),
        ("ACL", "LIST"), ("CLIENT", "KILL", "TYPE", "normal"), ("MONITOR",), ("EVAL", "return 1", "0"),
        ("XREAD", "STREAMS", NAMES.requests, "0"), ("XRANGE", NAMES.requests, "-", "+"), ("DEL", NAMES.requests),
        ("XRANGE", NAMES.fills, "-", "+"), ("XADD", NAMES.fills, "*", "a", "b"), ("XRANGE", NAMES.dead, "-", "+"),
        ("GET", NAMES.entry("k")), ("SET", NAMES.entry("k"), "v"), ("HGETALL", NAMES.flight("k")),
        ("LRANGE", NAMES.waiters("k", "t"), "0", "-1"), ("XRANGE", NAMES.landed, "-", "+"), ("HGETALL", "mp:stats"),
        ("DEL", NAMES.tags), ("DEL", NAMES.invalidations), ("XTRIM", NAMES.invalidations, "MAXLEN", "0"),
        ("HSET", "mp:deployment", "partitions", "9"), ("GET", "mp:worker:x"), ("GET", "mp:schedule:memory"),
    ],
    "application": [
        ("FLUSHALL",), ("KEYS", "*"), ("SCAN", "0"), ("XREAD", "STREAMS", NAMES.requests, "0"), ("INFO",),
        ("XRANGE", NAMES.fills, "-", "+"), ("XRANGE", NAMES.landed, "-", "+"), ("XRANGE", NAMES.dead, "-", "+"),
        ("XADD", NAMES.fills, "*", "a", "b"), ("HGETALL", "mp:stats"), ("CONFIG", "GET", "*"),
    ],
    "lookup": [
        ("FLUSHALL",), ("KEYS", "*"), ("SCAN", "0"), ("CONFIG", "GET", "*"), ("XRANGE", NAMES.landed, "-", "+"),
        ("GET", NAMES.outcome("k", "t")), ("SET", "mp:pressure", "1"), ("GET", "mp:schedule:memory"),
    ],
    "llm": [
        ("FLUSHALL",), ("KEYS", "*"), ("SCAN", "0"), ("CONFIG", "GET", "*"), ("XRANGE", NAMES.requests, "-", "+"),
        ("SET", "mp:pressure", "1"), ("GET", "mp:schedule:memory"),
    ],
    "background": [
        ("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "SET", "maxmemory", "0"), ("XRANGE", NAMES.requests, "-", "+"),
        ("XADD", NAMES.requests, "*", "a", "b"), ("SHUTDOWN",), ("GET", "something:else"),
    ],
    "operator": [
        ("FLUSHALL",), ("FLUSHDB",), ("KEYS", "*"), ("CONFIG", "SET", "maxmemory", "0"), ("SHUTDOWN",),
        ("ACL", "SETUSER", "x"), ("GET", "something:else"),
    ],
    "health": [("GET", "mp:pressure"), ("INFO",), ("SCRIPT", "LOAD", "return 1")],
}  # fmt: skip


@pytest.mark.parametrize(("role", "command"), [(r, c) for r, all_of in FORBIDDEN.items() for c in all_of])
def test_no_role_can_do_what_is_not_its_work(fortress: Guarded, role: str, command: tuple[str, ...]) -> None:
    with fortress.connect(role) as connection, pytest.raises(redis.exceptions.NoPermissionError):
        connection.execute_command(*command)
    fortress.refused()


#: What runs as that role: these modules, and all of ours that they import. A `client` uses a part of its own.
MODULES = {
    "client": ("producers.publisher", "producers.invalidation"),
    "application": ("producers.client",),
    "lookup": ("workers.lookup",),
    "llm": ("workers.llm",),
    "background": ("workers.persistence", "workers.promotion", "workers.invalidation", "workers.schedule"),
}
#: Scripts in those modules that the role never runs: an application that asks a provider itself asks no circuit.
UNUSED = {"application": {"circuit"}}
HERE = Path(__file__).parent.parent
_CALL = re.compile(r"redis\.p?call\('([A-Z]+)'")
_COMMON = re.compile(r"^local function (\w+)\(.*?^end$", re.M | re.S)


def commands_of(script: str) -> set[str]:
    """Return the commands a script may run, those of the functions it calls included."""
    functions = {found[1]: found[0] for found in _COMMON.finditer((HERE / "shared/scripts/_common.lua").read_text())}
    texts, seen = [(HERE / f"shared/scripts/{script}.lua").read_text()], set[str]()
    found: set[str] = set()
    while texts:
        text = texts.pop()
        found.update(_CALL.findall(text))
        called = {name for name in functions if re.search(rf"\b{name}\(", text)} - seen
        seen |= called
        texts += [functions[name] for name in called]
    return {command.lower() for command in found}


def sources(*names: str) -> list[str]:
    """Return the source of these modules and of all of ours that they import, at any time."""
    waiting, seen = list(names), dict[Path, str]()
    while waiting:
        path = HERE / (waiting.pop().replace(".", "/") + ".py")
        if path in seen or not path.exists():
            continue
        seen[path] = path.read_text()
        for node in ast.walk(ast.parse(seen[path])):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return list(seen.values())


@pytest.mark.parametrize("role", MODULES)
def test_a_role_may_run_whatever_its_scripts_do(role: str, tmp_path: Path) -> None:
    guarded.render(tmp_path / "users.acl", "true", **dict.fromkeys(guarded.ROLES, "secret"))
    (rules,) = [line for line in (tmp_path / "users.acl").read_text().splitlines() if line.startswith(f"user {role} ")]
    allowed = {word.strip("()+") for word in rules.split() if word.lstrip("(").startswith("+")}
    scripts = {name for text in sources(*MODULES[role]) for name in re.findall(r'SCRIPTS\["(\w+)"\]', text)}
    assert len(scripts) > 1
    scripts -= UNUSED.get(role, set())
    missing = {(script, command) for script in scripts for command in commands_of(script) if command not in allowed}
    assert missing == set()


def test_a_script_of_its_own_lets_a_client_do_no_more(fortress: Guarded) -> None:
    with fortress.connect("client") as connection:
        sha = connection.script_load("return redis.call('XRANGE', KEYS[1], '-', '+')")
        with pytest.raises(redis.ResponseError, match=r"(?i)permission|can't run this command"):
            connection.evalsha(sha, 1, NAMES.requests)
    fortress.refused()


def test_nobody_comes_in_without_a_name_or_with_a_wrong_password(fortress: Guarded) -> None:
    with redis.Redis(unix_socket_path=str(fortress.socket)) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    with redis.Redis.from_url(fortress.url("client", "wrong")) as wrong, pytest.raises(redis.AuthenticationError):
        wrong.ping()
    fortress.refused()


def test_a_role_without_a_password_is_refused_by_name(tmp_path: Path) -> None:
    given = dict.fromkeys(guarded.ROLES, "secret") | {"llm": ""}
    done = guarded.render(tmp_path / "users.acl", "true", **given)
    assert (done.returncode, "REDIS_LLM_PASSWORD" in done.stderr) == (2, True)
    rendered = guarded.render(tmp_path / "users.acl", "true", **given | {"llm": "secret"})
    assert rendered.returncode == 0
    text = (tmp_path / "users.acl").read_text()
    assert "secret" not in text
    assert "@client@" not in text
