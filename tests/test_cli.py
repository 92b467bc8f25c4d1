"""The `millpond` command: its front door, and commands whose exit codes mean something."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import millpond
from producers import commands as producing
from producers.blocking import BlockingClient
from shared.keys import PartitionKeys
from shared.messages import Mode
from shared.profiles import BUILT_IN
from shared.settings import Settings
from tests import command_line
from tests.command_line import FAST, await_that, run, run_json
from tests.conftest import Server
from tests.processes import FRONT_DOOR, start_worker

deployment = command_line.deployment

COMMANDS = (
    "up", "worker", "migrate", "ask", "replay", "demo", "invalidate", "warm", "stats", "report", "dead", "bench",
    "schedule", "doctor",
)  # fmt: skip


# the front door


def test_the_import_is_light() -> None:
    code = "import sys, millpond; millpond.Client; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=FRONT_DOOR.parent, check=True
    ).stdout.split()
    assert {"typer", "rich", "openai", "zstandard", "asyncpg", "sqlalchemy", "numpy", "workers"}.isdisjoint(loaded)


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
    subcommands = {"dead": ("list", "show", "retry", "discard"), "schedule": ("list", "run")}
    helps += [run(command, sub, "--help") for sub in subcommands.get(command, ())]
    assert all(found.returncode == 0 and "Example" in found.stdout for found in helps)
    assert "--json" in helps[-1].stdout


def test_help_lists_every_command() -> None:
    found = run("--help").stdout
    assert [command for command in COMMANDS if command not in found] == []


@pytest.mark.parametrize("delay", [0.05, 0.15, 0.25, None])
def test_ctrl_c_at_any_moment_prints_no_traceback(server: Server, delay: float | None) -> None:
    """So many seconds after its start, in which it imports, or when it waits for the answer."""
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
    if delay is not None:
        time.sleep(delay)
    else:
        with server.connect() as redis:
            await_that(lambda: redis.exists(PartitionKeys(0).requests) == 1)
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


@pytest.mark.parametrize(
    "command",
    [
        ("worker", "lookup"), ("ask", "x"), ("stats",), ("invalidate", "--all"), ("migrate",),
        ("dead", "list"), ("dead", "show", "1-0"), ("dead", "retry", "--all"), ("dead", "discard", "--all"),
    ],
)  # fmt: skip
def test_without_any_deployment_redis_is_unavailable(command: tuple[str, ...]) -> None:
    done = run(*command)
    assert done.returncode == 3
    assert "run `millpond up` in another terminal" in done.stderr


def test_settings_reach_the_commands(settings: Callable[..., Settings], server: Server) -> None:
    assert settings().redis_url is not None
    done = run("stats", "--json", url=server.url, concurrency="none")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["field"] == "concurrency"


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


def test_ask_embeds_a_text_with_a_profile_of_embeddings(deployment: str) -> None:
    found = run_json("ask", "mill pond", "--profile", "embedding", url=deployment)
    assert (found["model"], found["dimensions"], len(found["embedding"])) == ("text-embedding-3-small", 1536, 1536)
    with BlockingClient(deployment) as client:
        assert client.embed("Mill pond.").tolist() == np.float32(found["embedding"]).tolist()
    shown = run("ask", "MILL POND", "--profile", "embedding", url=deployment)
    assert shown.stdout.startswith(f"1536 dimensions: {found['embedding'][0]:.4f}, ")
    assert shown.stderr.startswith(("l1", "l2"))
    refused = run_json("ask", "x", "--profile", "embedding", "--system", "y", url=deployment, status=2)
    assert refused["error"]["field"] == "system"


def test_ask_says_by_which_option_a_profile_gets_its_scope(deployment: str) -> None:
    for profile, about in BUILT_IN.items():
        for field in about.scope:
            refused = run_json("ask", "Which mill?", "--profile", profile, url=deployment, status=2)["error"]
            assert (refused["field"], f"--scope {field}=" in refused["message"]) == (field, True)


def test_ask_shows_a_value_that_is_no_text(server: Server, tmp_path: Path) -> None:
    (tmp_path / "millpond.toml").write_text('[profiles.length]\nresolver = "builtins:len"\n')
    with start_worker("lookup", server.url, cwd=tmp_path), start_worker("llm", server.url, cwd=tmp_path):
        assert run("ask", "How long?", "--profile", "length", url=server.url).stdout == "2\n"


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


def test_invalidate_counts_per_tier_and_says_when_nobody_does(deployment: str) -> None:
    run_json("ask", "Who owns it?", "--tag", "doc:42", url=deployment)
    asked = ("invalidate", "--prefix", "doc:", "--timeout", "0.2")
    assert run_json(*asked, "--dry-run", url=deployment, status=4)["error"]["code"] == "deadline_exceeded"
    waited = run(*asked, "--wait", url=deployment)
    assert waited.returncode == 4
    assert "in force, but not deleted" in waited.stderr
    with start_worker("invalidation", deployment, l3=False):
        run_json("ask", "Who owns it?", "--tag", "doc:42", url=deployment)
        counted = run("invalidate", "--tag", "doc:42", "--dry-run", url=deployment)
        expected = "would be forgotten: doc:42; in 1 partition: l2 1, l3 none (l1 is not counted)\n"
        assert (counted.stdout, counted.stderr) == (expected, "")
        found = run_json("invalidate", "--tag", "doc:42", "--wait", "--reason", "corrected", url=deployment)
    assert {name: found[name] for name in ("l1", "l2", "l3", "complete", "dry_run")} == {
        "l1": "at once", "l2": 1, "l3": None, "complete": True, "dry_run": False,
    }  # fmt: skip
