"""What docs/protocol.md shows is what happens."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import subprocess
from hashlib import blake2b
from pathlib import Path
from string import Template

import orjson
import redis

from shared import errors, messages
from shared.messages import Rules, understand
from shared.settings import load
from tests import faults_support
from tests.conftest import Server
from tests.faults_support import Pond

pond = faults_support.pond
PAGE = Path(__file__).parent.parent / "docs" / "protocol.md"


def shown_commands() -> list[str]:
    """Return the lines of the fenced `sh` blocks that call redis-cli."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("redis-cli ")]


def run_shown(line: str, url: str, deadline_ms: int) -> str:
    """Run one line of the page in a shell against this server; without redis-cli, send its arguments as they are."""
    variables = {"DEADLINE_MS": str(deadline_ms), "NOW_MS": str(deadline_ms)}
    if shutil.which("redis-cli"):
        where = ["-s", url.removeprefix("unix://").split("?")[0]] if url.startswith("unix") else ["-u", url]
        command = line.replace("redis-cli", shlex.join(["redis-cli", *where]), 1)
        run = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=40, env=os.environ | variables
        )
        assert run.returncode == 0, run.stderr
        return run.stdout
    with redis.Redis.from_url(url, decode_responses=True) as connection:
        return str(connection.execute_command(*shlex.split(Template(line).safe_substitute(variables))[1:]))


async def test_the_worked_example_works(pond: Pond, server: Server) -> None:
    lines = shown_commands()
    assert len(lines) >= 4
    seconds, _ = pond.redis.time()
    async with pond.working("lookup", "llm"):
        told = [await _in_thread(line, server.url, (seconds + 60) * 1000) for line in lines]
    everything = "\n".join(told)
    payload = re.search(r'\{"tier".*\}', everything)
    assert payload, everything
    reply = orjson.loads(payload[0])
    assert reply["tier"] == "llm"
    assert reply["stored"] == "stored"
    assert reply["body"]["choices"][0]["message"]["content"]
    assert "demo1-1" in everything


async def _in_thread(line: str, url: str, deadline_ms: int) -> str:
    return await asyncio.to_thread(run_shown, line, url, deadline_ms)


def test_the_page_names_every_tier_code_directive_and_key() -> None:
    page = PAGE.read_text()
    for word in (*errors._BY_CODE, *messages._DIRECTIVES, "mp:deployment", "mp:stats", "mp:reply:", "mp:worker:"):
        if word != "config":  # raised where the process starts, never sent
            assert f"`{word}" in page, word


def test_the_key_is_derived_as_the_page_says() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "é?"}], "temperature": 1.0, "user": "ann"}
    question = understand(orjson.dumps(body), b'{"tenant":"acme"}', Rules.of(load()))
    asked = {"messages": [{"content": "é?", "role": "user"}]}
    text = '[1,"response","acme",{},"m","",' + orjson.dumps(asked).decode() + ',{"temperature":1}]'
    assert question.key == blake2b(text.encode(), digest_size=16).hexdigest()


def test_the_schema_on_the_page_is_the_one_recorded() -> None:
    assert f"Schema version: **{messages.SCHEMA}**" in PAGE.read_text()
