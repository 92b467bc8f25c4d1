"""What the tests of the `millpond` command share: run one command to its end, wait, a deployment to ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Server
from tests.processes import FRONT_DOOR, start_worker

FAST: dict[str, Any] = {"simulated_first_token": 0.01, "simulated_tokens_per_second": 100_000}


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


def await_that(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until the condition holds; fail when it does not in time."""
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
