"""A deployment for the length of one demo: embedded servers and `millpond up` on it, gone afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess  # it runs this program once more
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from shared import embedded, postgres
from shared.errors import ConfigError, Unavailable

FRONT_DOOR = Path(__file__).parent.parent.parent / "millpond.py"
READY_WITHIN = 30.0
GONE_WITHIN = 20.0

#: What `millpond up` says, then None when it has ended.
Events = queue.SimpleQueue[dict[str, Any] | None]


@contextlib.contextmanager
def deployment(heard: Callable[[dict[str, Any]], None], **environment: str) -> Iterator[str]:
    """Start the servers and all workers, yield Redis' URL once they are ready, stop everything.

    `heard` gets each event of `millpond up`; `environment` are settings for the workers. Call it from the main thread.

    Raises:
        ConfigError: there is no Redis to start. Without PostgreSQL it goes on.
        Unavailable: the workers did not become ready.
    """
    with (
        tempfile.TemporaryDirectory(prefix="millpond-demo-") as directory,
        embedded.start(Path(directory), ephemeral=True) as server,
        contextlib.ExitStack() as stack,
    ):
        env = os.environ | environment | {"MILLPOND_REDIS_URL": server.url, "MILLPOND_DATA_DIR": directory}
        try:  # never the caller's own database
            database = stack.enter_context(postgres.start(Path(directory), ephemeral=True))
            env |= {"MILLPOND_DATABASE_URL": database.url, "MILLPOND_L3": "true"}
        except ConfigError:
            env["MILLPOND_L3"] = "false"
        process = subprocess.Popen(  # noqa: S603 - our own argv, no shell
            embedded.tethered([sys.executable, str(FRONT_DOOR), "up", "--json"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,  # a Ctrl-C is for the replay, which then stops the workers
        )
        events: Events = queue.SimpleQueue()
        listener = threading.Thread(target=_listen, args=(process, events), daemon=True)
        listener.start()
        try:
            _await_running(events, heard)
            yield server.url
        finally:
            _stop(process, listener)


def _await_running(events: Events, heard: Callable[[dict[str, Any]], None]) -> None:
    deadline = monotonic() + READY_WITHIN
    last = "it said nothing"
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - monotonic()))
        except queue.Empty:
            raise Unavailable(
                f"the workers were not ready within {READY_WITHIN:.0f} s; the last event: {last}"
            ) from None
        if event is None:
            raise Unavailable(f"`millpond up` ended before it was ready ({last}); run `millpond doctor`")
        heard(event)
        last = json.dumps(event)
        if event.get("event") == "running":
            return


def _listen(process: subprocess.Popen[bytes], events: Events) -> None:
    """Read the events to the end of the process, so that its pipe never fills."""
    assert process.stdout is not None  # noqa: S101 - it was asked for
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            events.put(json.loads(line))
    events.put(None)


def _stop(process: subprocess.Popen[bytes], listener: threading.Thread) -> None:
    process.terminate()
    try:
        process.wait(GONE_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    listener.join()
    if process.stdout is not None:
        process.stdout.close()
