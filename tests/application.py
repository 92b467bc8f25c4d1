"""An application in a process of its own: it computes through `get_or_compute`, says so line by line, may be killed.

`python -m tests.application '{"goes_on": "FILE", "fails": false, "timeout": 20}'`, settings by environment. It computes
until that file is there. Every computation appends a line to the journal before it begins, so a test counts what ran
whoever died.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from producers.client import Client
from shared.errors import MillpondError
from tests.processes import Process, our_code_environment, variables

PROFILE = "retrieval"
ARGS = {"query": "What is a mill race?"}


def say(event: str, **fields: Any) -> None:
    """Print one line for the test to read."""
    print(json.dumps({"event": event} | fields), flush=True)


def noted(journal: str) -> int:
    """Append to the journal that a computation begins; return which of the application's it is."""
    with Path(journal).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return os.getpid()


def _await_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


async def application(options: Mapping[str, Any]) -> None:
    """Ask once; tell what came of it."""

    async def work() -> dict[str, int]:
        pid = noted(options["journal"])
        say("computing")
        await asyncio.to_thread(_await_file, Path(options["goes_on"]))
        if options.get("fails"):
            raise ValueError("no head of water")
        return {"pid": pid}

    async with Client() as client:
        say("ready", name="application")
        asked = client.get_or_compute(
            options.get("profile", PROFILE), ARGS, work, tags=["mill:1"], timeout=options.get("timeout", 20)
        )
        try:
            say("value", value=await asked)
        except (MillpondError, ValueError) as error:
            say("error", kind=type(error).__name__, message=str(error))


class Application(Process):
    """The same, as the test sees it."""

    def __init__(self, settings: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._start(["-m", "tests.application", json.dumps(options)], our_code_environment() | variables(settings))


def computed(journal: Path) -> int:
    """Return how many computations have begun."""
    return len(journal.read_text().splitlines()) if journal.exists() else 0


if __name__ == "__main__":
    asyncio.run(application(json.loads(sys.argv[1])))
