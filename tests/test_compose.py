"""docker-compose.yml: well formed, complete, and a topology that works when its services run as plain processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from producers.client import Client
from shared.embedded import find_binary, tethered
from shared.errors import ConfigError
from shared.settings import Settings, load
from tests.command_line import FAST
from tests.conftest import _binary
from tests.databases import Database
from tests.guarded import await_up
from tests.processes import Process
from workers.kinds import Kind

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
WORKERS = {name: about for name, about in SERVICES.items() if str(about.get("command", "")).startswith("worker ")}
#: The services that may be scaled, and how many of each the test below runs.
SCALED = {"lookup": 2, "llm": 2}
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def filled_in() -> dict[str, str]:
    """Return the variables of .env.example, its empty passwords filled in as it says."""
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    named = dict(line.split("=", 1) for line in lines)
    return {
        name: value or (f"{name.lower()}0123" if name.endswith("PASSWORD") else "") for name, value in named.items()
    }


def interpolated(text: str, variables: dict[str, str]) -> str:
    """Return the text with its `${…}` replaced as compose does."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        given = variables.get(name, "")
        assert given or kind == "-", f"{name} is mandatory and has no value"
        return given or rest

    return _VARIABLE.sub(value, text)


def environment(service: str, variables: dict[str, str]) -> dict[str, str]:
    """Return the environment of a service."""
    given: dict[str, Any] = SERVICES[service].get("environment", {})
    return {name: interpolated(str(value), variables) for name, value in given.items()}


def test_every_kind_of_worker_is_a_service() -> None:
    assert {about["command"] for about in WORKERS.values()} == {f"worker {kind}" for kind in Kind}


def test_every_worker_waits_for_redis_and_the_migrations_and_starts_again() -> None:
    for about in WORKERS.values():
        assert about["depends_on"] == {
            "redis": {"condition": "service_healthy"},
            "migrate": {"condition": "service_completed_successfully"},
        }
        assert about["restart"] == "unless-stopped"
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name, about in SERVICES.items():
        for other in about.get("depends_on", {}):
            assert other in SERVICES, f"{name} waits for {other}"


def test_workers_can_be_scaled() -> None:
    for name, about in WORKERS.items():
        assert not {"container_name", "ports", "hostname", "volumes"} & set(about), name


def test_each_service_has_the_user_of_its_role_and_settings_that_exist() -> None:
    variables = filled_in()
    for name in [*WORKERS, "migrate", "operator"]:
        given = environment(name, variables)
        url = given.get("MILLPOND_REDIS_URL")
        if url is not None:
            role = name if name in ("lookup", "llm", "operator") else "background"
            assert url == f"redis://{role}:{variables[f'REDIS_{role.upper()}_PASSWORD']}@redis:6379/0"
        settings = [each for each in given if each.startswith("MILLPOND_")]
        assert {each.removeprefix("MILLPOND_").lower() for each in settings} <= set(Settings.model_fields)


def test_servers_have_passwords_volumes_and_health_checks() -> None:
    for name in ("redis", "postgres"):
        assert SERVICES[name]["healthcheck"]["test"]
        volume = SERVICES[name]["volumes"][0].partition(":")[0]
        assert volume in COMPOSE["volumes"]
    assert "5432" not in str(SERVICES["postgres"].get("ports", ""))
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["redis"]["ports"])
    for mounted in (volume for volume in SERVICES["redis"]["volumes"] if volume.startswith("./")):
        assert (ROOT / mounted.partition(":")[0]).is_file()


def test_the_example_names_every_variable_and_holds_no_password() -> None:
    used = {found[0] for found in _VARIABLE.findall((ROOT / "docker-compose.yml").read_text())}
    example = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"^(\w+)=", example, re.M))
    assert used == named
    assert not re.search(r"PASSWORD=.", example)
    assert ".env" in (ROOT / ".dockerignore").read_text().splitlines()


def test_the_command_can_be_used_where_the_example_lies(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in filled_in().items()))
    assert load().partitions == 1


def test_compose_itself_accepts_it(tmp_path: Path) -> None:
    standalone = shutil.which("docker-compose")
    docker = shutil.which("docker")
    if standalone:
        command = [standalone]
    elif docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        command = [docker, "compose"]
    else:
        pytest.skip("no docker compose here")
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in filled_in().items()))
    where = ["--file", str(ROOT / "docker-compose.yml"), "--env-file", str(tmp_path / "env")]
    done = subprocess.run([*command, *where, "config"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(SERVICES) - set(yaml.safe_load(done.stdout)["services"]) <= {"operator"}
    refused = subprocess.run([*command, *where[:2], "--env-file", str(ROOT / ".env.example"), "config"],
                             capture_output=True, text=True, check=False)  # fmt: skip
    assert refused.returncode != 0
    assert "fill in .env" in refused.stderr


# the same topology as plain processes


def free_port() -> int:
    """Return a port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def redis_service(server_kind: str, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Run the redis service as a process; yield its host and port, and the variables it was given."""
    if server_kind in ("url", "container"):
        pytest.skip("needs a server of its own, with users")
    try:
        binary = _binary(server_kind) or find_binary()
    except ConfigError:
        pytest.skip("no server to start")
    variables = filled_in()
    port = free_port()
    words = shlex.split(interpolated(SERVICES["redis"]["command"], variables))
    assert words[0] == "redis-server"
    command = ["sh", str(ROOT / "deploy" / "redis.sh"), str(binary), *words[1:], "--port", str(port)]
    given = environment("redis", variables) | {"PATH": os.environ["PATH"], "ACL_FILE": str(tmp_path / "users.acl")}
    process = subprocess.Popen(tethered([shutil.which("sh") or "sh", *command[1:], "--dir", str(tmp_path)]),
                               env=given, stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        await_up(process, lambda: redis.Redis(port=port, username="health", password="any"))
        yield f"127.0.0.1:{port}", variables
    finally:
        process.terminate()
        process.wait(20)


async def test_the_topology_works_as_plain_processes(
    redis_service: tuple[str, dict[str, str]], empty_database: Database
) -> None:
    where, variables = redis_service

    def start(service: str) -> Process:
        given = environment(service, variables)
        url = given.pop("MILLPOND_REDIS_URL", "").replace("redis:6379", where) or None
        given["MILLPOND_DATABASE_URL"] = empty_database.url
        overrides = {name.removeprefix("MILLPOND_").lower(): value for name, value in given.items()}
        return Process(SERVICES[service]["command"].split(), url, overrides | FAST)

    with ExitStack() as stack:
        migrate = stack.enter_context(start("migrate"))
        assert migrate.wait() == 0, migrate.report()
        names = [name for name in WORKERS for _ in range(SCALED.get(name, 1))]
        started = [stack.enter_context(start(name)) for name in names]
        for process in started:
            process.wait_for("ready")
        client_url = f"redis://client:{variables['REDIS_CLIENT_PASSWORD']}@{where}/0"
        async with Client(settings=load(redis_url=client_url)) as client:
            replies = [await client.ask(f"Question {n % 5}") for n in range(20)]
            assert sum(reply.tier == "llm" for reply in replies) == 5
            await client.invalidate(tenant="default")
            assert (await client.ask("Question 1")).tier == "llm"
        for process in started:
            assert process.terminate() == 0, process.report()
